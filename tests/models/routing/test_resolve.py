"""Every rule of `routing`: what each control becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.edge import (
    ADAPTIVE,
    ALL_EXITS,
    CONFIDENT,
    EFFORT,
    LAYERS,
    PROFILED,
    UNCHUNKED,
    depth,
    leaving,
    policy,
    refused,
)

from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)

SKIP = {"blocks": [2]}
TOP_BLOCKS = SkipSet.of(blocks=(1, 3), phase=Phase.DECODE, elastic=True)

GOOD: dict[str, tuple[dict[str, Any], RoutingPolicy]] = {
    "a share rounds half up": (
        depth(skip={"fraction": 0.25, "by": "attention"}, phase="decode"),
        RoutingPolicy(SkipSet.of(attention=(0, 5), phase=Phase.DECODE)),
    ),
    "all attention may go": (
        depth(skip={"fraction": 0.95, "by": "attention"}),
        RoutingPolicy(SkipSet.of(attention=tuple(range(LAYERS)))),
    ),
    "a fixed exit": (
        depth(exit={"method": "fixed", "layers": [2]}),
        RoutingPolicy(SkipSet.of(blocks=(3, 4, 5))),
    ),
    "a fixed exit for generated tokens": (
        depth(exit={"method": "fixed", "layers": [4]}, phase="decode"),
        RoutingPolicy(SkipSet.of(blocks=(5,), phase=Phase.DECODE)),
    ),
    "a fixed exit joins a skip set": (
        depth(exit={"method": "fixed", "layers": [3]}, skip={"attention": [0], "mlp": [4]}),
        RoutingPolicy(SkipSet.of(blocks=(4, 5), attention=(0,))),
    ),
    "exits everywhere": (
        leaving(),
        RoutingPolicy(exit=ExitRule("confidence", ALL_EXITS, threshold=0.5)),
    ),
    "exits from a layer on": (
        leaving(min_layer=3),
        RoutingPolicy(exit=ExitRule("confidence", (3, 4), threshold=0.5)),
    ),
    "named exits, in order of depth": (
        leaving(layers=[4, 2], min_layer=2),
        RoutingPolicy(exit=ExitRule("confidence", (2, 4), threshold=0.5)),
    ),
    "a whole number for a threshold": (
        leaving(threshold=1),
        RoutingPolicy(exit=ExitRule("confidence", ALL_EXITS, threshold=1.0)),
    ),
    "a negative cosine": (
        leaving("saturation", threshold=-0.5),
        RoutingPolicy(exit=ExitRule("saturation", ALL_EXITS, threshold=-0.5)),
    ),
    "decay": (
        leaving(decay=4),
        RoutingPolicy(exit=ExitRule("confidence", ALL_EXITS, threshold=0.5, decay=4.0)),
    ),
    "sparing": (
        leaving(sparing=True),
        RoutingPolicy(exit=ExitRule("confidence", ALL_EXITS, threshold=0.5, sparing=True)),
    ),
    "sparing, not": (
        leaving(sparing=False),
        RoutingPolicy(exit=ExitRule("confidence", ALL_EXITS, threshold=0.5)),
    ),
    "recompute": (
        leaving("entropy", kv="recompute"),
        RoutingPolicy(exit=ExitRule("entropy", ALL_EXITS, threshold=0.5, kv=MissingKV.RECOMPUTE)),
    ),
    "recompute beside an empty skip set": (
        depth(exit={**CONFIDENT, "kv": "recompute"}, skip={}),
        RoutingPolicy(
            exit=ExitRule("confidence", ALL_EXITS, threshold=0.5, kv=MissingKV.RECOMPUTE)
        ),
    ),
    "patience": (
        depth(exit={"method": "patience", "patience": 3}),
        RoutingPolicy(exit=ExitRule("patience", ALL_EXITS, patience=3)),
    ),
    "exits beside a skip set with its phase": (
        depth(exit=CONFIDENT, skip=SKIP, phase="prefill"),
        RoutingPolicy(
            SkipSet.of(blocks=(2,), phase=Phase.PREFILL),
            ExitRule("confidence", ALL_EXITS, threshold=0.5),
        ),
    ),
    "lac by default": (
        depth(adaptive={"method": "lac"}),
        RoutingPolicy(adaptive=AdaptiveRule("lac", mode="predict", threshold=0.8)),
    ),
    "lac in another mode": (
        depth(adaptive={"method": "lac", "mode": "readout", "threshold": 0.3}),
        RoutingPolicy(adaptive=AdaptiveRule("lac", mode="readout", threshold=0.3)),
    ),
    "similarity by threshold": (
        depth(adaptive={"method": "similarity", "threshold": 0.9}),
        RoutingPolicy(adaptive=AdaptiveRule("similarity", threshold=0.9)),
    ),
    "similarity by budget": (
        depth(adaptive={"method": "similarity", "budget": 0.6}),
        RoutingPolicy(adaptive=AdaptiveRule("similarity", budget=0.6)),
    ),
    "mod by its schedule": (
        depth(adaptive={"method": "mod"}),
        RoutingPolicy(adaptive=AdaptiveRule("mod")),
    ),
    "mod by a list": (
        depth(adaptive={"method": "mod", "retention": [1, 1, 0.5, 0.5, 0.5, 1]}),
        RoutingPolicy(adaptive=AdaptiveRule("mod", retention=(1.0, 1.0, 0.5, 0.5, 0.5, 1.0))),
    ),
    "effort": ({"effort": 0.7}, RoutingPolicy(TOP_BLOCKS)),
    "full effort": ({"effort": 1}, RoutingPolicy()),
    "full effort, whatever the phase": ({"effort": 1, **depth(phase="both")}, RoutingPolicy()),
    "effort in the prompt too": (
        {"effort": 0.7, **depth(phase="both")},
        RoutingPolicy(replace(TOP_BLOCKS, phase=Phase.BOTH)),
    ),
    "an empty skip set hinders nothing": (
        {"effort": 0.7, **depth(skip={})},
        RoutingPolicy(TOP_BLOCKS),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_resolved(name: str) -> None:
    routing, expected = GOOD[name]
    resolved = policy({**routing, "report": True}, PROFILED)
    assert resolved == replace(expected, report=True)
    assert RoutingPolicy.from_dict(resolved.to_dict(), report=True) == resolved


PROFILE_GOOD: dict[str, tuple[dict[str, Any], RoutingPolicy]] = {
    "blocks by importance": (
        depth(skip={"fraction": 0.5, "by": "block"}),
        RoutingPolicy(SkipSet.of(blocks=(1, 3, 5))),
    ),
    "joint by importance": (
        depth(skip={"fraction": 0.2, "by": "joint"}),
        RoutingPolicy(SkipSet.of(attention=(0,), mlp=(2,))),
    ),
    "effort by importance": (
        {"effort": 0.7},
        RoutingPolicy(SkipSet.of(blocks=(1, 3), phase=Phase.DECODE, elastic=True)),
    ),
    "a trained exit": (
        leaving("classifier"),
        RoutingPolicy(exit=ExitRule("classifier", ALL_EXITS, threshold=0.5)),
    ),
    "trained routers": (
        depth(adaptive={"method": "first"}),
        RoutingPolicy(adaptive=AdaptiveRule("first", threshold=0.5)),
    ),
    "routers for the generated tokens only": (
        depth(adaptive={"method": "first", "masked_prefill": False}),
        RoutingPolicy(adaptive=AdaptiveRule("first", threshold=0.5)),
    ),
}


@pytest.mark.parametrize("name", PROFILE_GOOD)
def test_resolved_with_a_profile(name: str) -> None:
    routing, expected = PROFILE_GOOD[name]
    assert policy(routing, PROFILED) == expected


def test_masked_prefill_where_prompts_run_in_one_step() -> None:
    routing = depth(adaptive={"method": "first", "masked_prefill": True})
    rule = AdaptiveRule("first", threshold=0.5, masked_prefill=True)
    assert policy(routing, UNCHUNKED).adaptive == rule


@given(st.lists(st.floats(0.1, 1), min_size=2, max_size=2))
def test_efforts_are_nested(efforts: list[float]) -> None:
    less, more = (policy({"effort": effort}, PROFILED).skip.attention for effort in sorted(efforts))
    assert set(more) <= set(less)


def test_each_control_of_the_request_replaces_the_presets() -> None:
    preset = {"depth": {"skip": {"blocks": [4]}, "exit": CONFIDENT, "phase": "decode"}}
    base = policy({}, preset=preset)
    assert base.skip == SkipSet.of(blocks=(4,), phase=Phase.DECODE)
    assert base.exit == ExitRule("confidence", ALL_EXITS, threshold=0.5)
    stricter = {"method": "entropy", "threshold": 0.1, "min_layer": 3}
    assert policy(depth(exit=stricter), preset=preset) == replace(
        base, exit=ExitRule("entropy", (3, 4), threshold=0.1)
    )
    assert policy(depth(skip={"mlp": [1]}), preset=preset) == replace(
        base, skip=SkipSet.of(mlp=(1,), phase=Phase.DECODE)
    )


def test_effort_in_a_preset() -> None:
    preset = {"effort": 0.7}
    assert policy({}, PROFILED, preset).skip == TOP_BLOCKS
    assert policy({"effort": 1}, PROFILED, preset).stock
    assert refused(depth(skip=SKIP), preset=preset) == (EFFORT, "unsupported_combination")


def test_a_control_beside_a_preset_that_excludes_it() -> None:
    adaptive = {"depth": {"adaptive": {"method": "lac"}}}
    assert refused(depth(skip=SKIP), preset=adaptive) == (ADAPTIVE, "unsupported_combination")
    skipping = {"depth": {"skip": SKIP}}
    routing = depth(skip={}, adaptive={"method": "lac"})
    assert policy(routing, preset=skipping).adaptive == AdaptiveRule(
        "lac", mode="predict", threshold=0.8
    )
