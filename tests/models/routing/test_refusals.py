"""Every rule of `routing` that refuses: with which field and for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    ADAPTIVE,
    CAPABILITIES,
    CONFIDENT,
    EFFORT,
    EXIT,
    LAYERS,
    PHASE,
    PROFILED,
    SKIP_PARAM,
    depth,
    leaving,
    policy,
    refused,
)

from sluice.models.depth.registry import token_exits
from sluice.models.routing.errors import RoutingError

SKIP = {"blocks": [2]}


def similar(**fields: Any) -> dict[str, Any]:
    return depth(adaptive={"method": "similarity", **fields})


def mixing(*retention: Any) -> dict[str, Any]:
    return depth(adaptive={"method": "mod", "retention": list(retention)})


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # skip
    "fraction without by": (depth(skip={"fraction": 0.5}), f"{SKIP_PARAM}.by", "invalid_field"),
    "by without fraction": (depth(skip={"by": "block"}), f"{SKIP_PARAM}.fraction", "invalid_field"),
    "unknown by": (
        depth(skip={"fraction": 0.5, "by": "head"}),
        f"{SKIP_PARAM}.by",
        "invalid_field",
    ),
    "fraction beside a list": (
        depth(skip={"fraction": 0.5, "by": "block", "mlp": [1]}),
        f"{SKIP_PARAM}.mlp",
        "invalid_field",
    ),
    "fraction 0": (
        depth(skip={"fraction": 0, "by": "block"}),
        f"{SKIP_PARAM}.fraction",
        "invalid_field",
    ),
    "fraction 1": (
        depth(skip={"fraction": 1, "by": "attention"}),
        f"{SKIP_PARAM}.fraction",
        "invalid_field",
    ),
    "fraction as text": (
        depth(skip={"fraction": "0.5", "by": "block"}),
        f"{SKIP_PARAM}.fraction",
        "invalid_field",
    ),
    "fraction is no number": (
        depth(skip={"fraction": float("nan"), "by": "block"}),
        f"{SKIP_PARAM}.fraction",
        "invalid_field",
    ),
    # exit: fixed
    "fixed without layers": (depth(exit={"method": "fixed"}), f"{EXIT}.layers", "invalid_field"),
    "fixed at two layers": (
        depth(exit={"method": "fixed", "layers": [1, 2]}),
        f"{EXIT}.layers",
        "invalid_field",
    ),
    "fixed at the last layer": (
        depth(exit={"method": "fixed", "layers": [LAYERS - 1]}),
        f"{EXIT}.layers.0",
        "invalid_field",
    ),
    "fixed at no layer": (
        depth(exit={"method": "fixed", "layers": [LAYERS]}),
        f"{EXIT}.layers.0",
        "layer_out_of_range",
    ),
    "fixed with a threshold": (
        depth(exit={"method": "fixed", "layers": [1], "threshold": 0.5}),
        f"{EXIT}.threshold",
        "invalid_field",
    ),
    "fixed with kv": (
        depth(exit={"method": "fixed", "layers": [1], "kv": "propagate"}),
        f"{EXIT}.kv",
        "invalid_field",
    ),
    "fixed and skip leave nothing": (
        depth(exit={"method": "fixed", "layers": [1]}, skip={"blocks": [0, 1]}),
        f"{EXIT}.layers",
        "nothing_left_to_run",
    ),
    # exit: per token
    "exit without method": (depth(exit={"threshold": 0.5}), f"{EXIT}.method", "invalid_field"),
    "unknown exit": (leaving("lucky"), f"{EXIT}.method", "invalid_field"),
    "adaptive method as an exit": (leaving("lac"), f"{EXIT}.method", "invalid_field"),
    "unknown exit field": (leaving(theta=1), f"{EXIT}.theta", "invalid_field"),
    "no exit layers": (leaving(layers=[]), f"{EXIT}.layers", "invalid_field"),
    "exit after the last layer": (
        leaving(layers=[2, LAYERS - 1]),
        f"{EXIT}.layers.1",
        "invalid_field",
    ),
    "exit after a layer that is not there": (
        leaving(layers=[LAYERS]),
        f"{EXIT}.layers.0",
        "layer_out_of_range",
    ),
    "exit before the first layer": (leaving(layers=[-1]), f"{EXIT}.layers.0", "layer_out_of_range"),
    "an exit twice": (leaving(layers=[1, 2, 1]), f"{EXIT}.layers.2", "invalid_field"),
    "exit below min_layer": (
        leaving(layers=[3, 1], min_layer=2),
        f"{EXIT}.layers.1",
        "invalid_field",
    ),
    "min_layer at the last layer": (
        leaving(min_layer=LAYERS - 1),
        f"{EXIT}.min_layer",
        "invalid_field",
    ),
    "negative min_layer": (leaving(min_layer=-1), f"{EXIT}.min_layer", "invalid_field"),
    "threshold missing": (
        depth(exit={"method": "confidence"}),
        f"{EXIT}.threshold",
        "invalid_field",
    ),
    "threshold too high": (leaving(threshold=1.01), f"{EXIT}.threshold", "invalid_field"),
    "threshold too low": (
        leaving("saturation", threshold=-1.5),
        f"{EXIT}.threshold",
        "invalid_field",
    ),
    "threshold is a boolean": (leaving(threshold=True), f"{EXIT}.threshold", "invalid_field"),
    "infinite threshold": (leaving(threshold=float("inf")), f"{EXIT}.threshold", "invalid_field"),
    "patience missing": (depth(exit={"method": "patience"}), f"{EXIT}.patience", "invalid_field"),
    "patience 0": (
        depth(exit={"method": "patience", "patience": 0}),
        f"{EXIT}.patience",
        "invalid_field",
    ),
    "half a patience": (
        depth(exit={"method": "patience", "patience": 1.5}),
        f"{EXIT}.patience",
        "invalid_field",
    ),
    "patience with a threshold": (
        depth(exit={"method": "patience", "patience": 2, "threshold": 0.5}),
        f"{EXIT}.threshold",
        "invalid_field",
    ),
    "confidence with patience": (leaving(patience=2), f"{EXIT}.patience", "invalid_field"),
    "entropy with decay": (leaving("entropy", decay=4), f"{EXIT}.decay", "invalid_field"),
    "sparing where a test costs nothing": (
        leaving("saturation", sparing=True),
        f"{EXIT}.sparing",
        "invalid_field",
    ),
    "sparing, a number": (leaving(sparing=1), f"{EXIT}.sparing", "invalid_field"),
    "decay 0": (leaving(decay=0), f"{EXIT}.decay", "invalid_field"),
    "unknown kv": (leaving(kv="copy"), f"{EXIT}.kv", "invalid_field"),
    "recompute beside skip": (
        depth(exit={**CONFIDENT, "kv": "recompute"}, skip=SKIP),
        f"{EXIT}.kv",
        "unsupported_combination",
    ),
    "untrained exit": (leaving("classifier"), f"{EXIT}.method", "needs_profile"),
    # adaptive
    "adaptive without method": (depth(adaptive={}), f"{ADAPTIVE}.method", "invalid_field"),
    "unknown adaptive": (
        depth(adaptive={"method": "guess"}),
        f"{ADAPTIVE}.method",
        "invalid_field",
    ),
    "exit as adaptive": (depth(adaptive=CONFIDENT), f"{ADAPTIVE}.method", "invalid_field"),
    "no routers": (depth(adaptive={"method": "first"}), f"{ADAPTIVE}.method", "needs_profile"),
    "unknown mode": (
        depth(adaptive={"method": "lac", "mode": "skip"}),
        f"{ADAPTIVE}.mode",
        "invalid_field",
    ),
    "lac threshold": (
        depth(adaptive={"method": "lac", "threshold": 1.5}),
        f"{ADAPTIVE}.threshold",
        "invalid_field",
    ),
    "lac with a budget": (
        depth(adaptive={"method": "lac", "budget": 0.5}),
        f"{ADAPTIVE}.budget",
        "invalid_field",
    ),
    "lac with masked prefill": (
        depth(adaptive={"method": "lac", "masked_prefill": False}),
        f"{ADAPTIVE}.masked_prefill",
        "invalid_field",
    ),
    "similarity with a mode": (
        similar(threshold=0.5, mode="predict"),
        f"{ADAPTIVE}.mode",
        "invalid_field",
    ),
    "similarity with neither": (similar(), f"{ADAPTIVE}.threshold", "invalid_field"),
    "similarity with both": (
        similar(threshold=0.9, budget=0.5),
        f"{ADAPTIVE}.budget",
        "invalid_field",
    ),
    "budget for nothing": (similar(budget=0.01), f"{ADAPTIVE}.budget", "nothing_left_to_run"),
    "budget for everything": (similar(budget=0.95), f"{ADAPTIVE}.budget", "invalid_field"),
    "budget over 1": (similar(budget=1.5), f"{ADAPTIVE}.budget", "invalid_field"),
    "similarity threshold": (similar(threshold=2), f"{ADAPTIVE}.threshold", "invalid_field"),
    "mod for too few layers": (mixing(0.5), f"{ADAPTIVE}.retention", "invalid_field"),
    "mod keeps nothing": (
        mixing(0.5, 0, 0.5, 0.5, 0.5, 0.5),
        f"{ADAPTIVE}.retention.1",
        "invalid_field",
    ),
    "mod keeps too much": (
        mixing(0.5, 1.5, 0.5, 0.5, 0.5, 0.5),
        f"{ADAPTIVE}.retention.1",
        "invalid_field",
    ),
    "mod does nothing": (mixing(1, 1, 1, 1, 1, 1.0), f"{ADAPTIVE}.retention", "invalid_field"),
    "mod with a threshold": (
        depth(adaptive={"method": "mod", "threshold": 0.5}),
        f"{ADAPTIVE}.threshold",
        "invalid_field",
    ),
    # effort
    "effort 0": ({"effort": 0}, EFFORT, "invalid_field"),
    "effort over 1": ({"effort": 1.2}, EFFORT, "invalid_field"),
    "effort as text": ({"effort": "low"}, EFFORT, "invalid_field"),
    "effort is a boolean": ({"effort": True}, EFFORT, "invalid_field"),
    # combinations
    "adaptive and skip": (
        depth(adaptive={"method": "mod"}, skip=SKIP),
        ADAPTIVE,
        "unsupported_combination",
    ),
    "adaptive and exit": (
        depth(adaptive={"method": "mod"}, exit=CONFIDENT),
        ADAPTIVE,
        "unsupported_combination",
    ),
    "adaptive and fixed": (
        depth(adaptive={"method": "mod"}, exit={"method": "fixed", "layers": [2]}),
        ADAPTIVE,
        "unsupported_combination",
    ),
    "effort and skip": ({"effort": 0.5, **depth(skip=SKIP)}, EFFORT, "unsupported_combination"),
    "full effort and skip": ({"effort": 1, **depth(skip=SKIP)}, EFFORT, "unsupported_combination"),
    "effort and exit": (
        {"effort": 0.5, **depth(exit=CONFIDENT)},
        EFFORT,
        "unsupported_combination",
    ),
    "effort and adaptive": (
        {"effort": 0.5, **depth(adaptive={"method": "mod"})},
        EFFORT,
        "unsupported_combination",
    ),
    "phase and adaptive": (
        depth(adaptive={"method": "mod"}, phase="decode"),
        PHASE,
        "unsupported_combination",
    ),
    "phase and a per-token exit": (depth(exit=CONFIDENT, phase="decode"), PHASE, "invalid_field"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    routing, *expected = BAD[name]
    assert [*refused(routing)] == expected


BAD_ORDERED: dict[str, tuple[dict[str, Any], str, str]] = {
    "fraction of none": (
        depth(skip={"fraction": 0.05, "by": "block"}),
        f"{SKIP_PARAM}.fraction",
        "invalid_field",
    ),
    "fraction of all": (
        depth(skip={"fraction": 0.95, "by": "block"}),
        f"{SKIP_PARAM}.fraction",
        "nothing_left_to_run",
    ),
    "joint fraction of all": (
        depth(skip={"fraction": 0.99, "by": "joint"}),
        f"{SKIP_PARAM}.fraction",
        "nothing_left_to_run",
    ),
    "effort for nothing": ({"effort": 0.01}, EFFORT, "nothing_left_to_run"),
}


@pytest.mark.parametrize("name", BAD_ORDERED)
def test_refused_of_a_measured_order(name: str) -> None:
    routing, *expected = BAD_ORDERED[name]
    assert [*refused(routing, PROFILED)] == expected


def test_refused_for_want_of_tensors_in_the_profile() -> None:
    expected = (f"{EXIT}.method", "needs_profile")
    assert refused(leaving("q_exit"), PROFILED) == expected


def test_masked_prefill_names_the_flag_it_needs() -> None:
    routing = depth(adaptive={"method": "first", "masked_prefill": True})
    with pytest.raises(RoutingError, match="--no-enable-chunked-prefill") as caught:
        policy(routing, PROFILED)
    assert caught.value.param == f"{ADAPTIVE}.masked_prefill"
    assert caught.value.reason == "unsupported_combination"


def test_a_model_of_one_layer_has_no_exit() -> None:
    single = replace(CAPABILITIES, layers=1)
    assert refused(leaving(), single) == (EXIT, "invalid_field")
    schedule = depth(adaptive={"method": "mod"})
    assert refused(schedule, single) == (f"{ADAPTIVE}.retention", "invalid_field")


@pytest.mark.parametrize("name", token_exits())
def test_every_exit_method_takes_its_own_parameters_and_no_others(name: str) -> None:
    everything = replace(PROFILED, profile=replace(PROFILED.profile, methods={*token_exits()}))
    parameters = token_exits()[name].parameters
    given = {key: int(p.high) if p.integer else p.high for key, p in parameters.items()}
    rule = policy(depth(exit={"method": name, **given}), everything).exit
    assert rule is not None
    assert dict(rule.parameters) == given
    for other in {"threshold", "patience"} - {*parameters}:
        routing = depth(exit={"method": name, **given, other: 1})
        assert refused(routing, everything) == (f"{EXIT}.{other}", "invalid_field")
    for key, parameter in parameters.items():
        routing = depth(exit={"method": name, **given, key: int(parameter.high) + 1})
        assert refused(routing, everything) == (f"{EXIT}.{key}", "invalid_field")
