"""What a client reads about fields that are not valid."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import parse_routing

SAID: dict[str, tuple[Any, str]] = {
    "no object": ([1], "routing: must be an object"),
    "a key with a slip": ({"dept": {}}, "routing.dept: no such field; did you mean 'depth'?"),
    "a key like none": (
        {"xyz": 1},
        "routing.xyz: no such field; there are depth, effort, experts, preset, report",
    ),
    "a method's parameter with a slip": (
        {"depth": {"exit": {"method": "confidence", "treshold": 0.5}}},
        "routing.depth.exit.treshold: no such field; did you mean 'threshold'?",
    ),
    "a word for a number": (
        {"depth": {"skip": {"mlp": ["3"]}}},
        "routing.depth.skip.mlp.0: must be a whole number",
    ),
    "a number for a list": (
        {"depth": {"skip": {"mlp": 3}}},
        "routing.depth.skip.mlp: must be a list",
    ),
    "out of range": ({"effort": 2}, "routing.effort: must be at most 1"),
    "at the edge": ({"effort": 0}, "routing.effort: must be greater than 0"),
    "another word": (
        {"depth": {"phase": "always"}},
        "routing.depth.phase: must be 'prefill', 'decode' or 'both'",
    ),
    "a word that is none": (
        {"depth": {"phase": "\ud800"}},
        "routing.depth.phase: must be a string",
    ),
    "missing": ({"depth": {"exit": {}}}, "routing.depth.exit.method: is missing"),
    "null for what must be there": (
        {"depth": {"exit": {"method": None}}},
        "routing.depth.exit.method: is missing",
    ),
    "several": (
        {"effort": 2, "report": "yes"},
        "routing.effort: must be at most 1; routing.report: must be true or false",
    ),
    "many": (
        {
            "depth": {"skip": {"blocks": 1, "mlp": 1, "attention": 1, "fraction": 2}, "phase": 1},
            "effort": 2,
            "report": 1,
        },
        "routing.depth.skip.blocks: must be a list; routing.depth.skip.attention: must be a list; "
        "routing.depth.skip.mlp: must be a list; routing.depth.skip.fraction: must be less than 1; "
        "routing.depth.phase: must be 'prefill', 'decode' or 'both'; and 2 more",
    ),
    "infinite": (
        {"experts": {"skip_ratio": float("inf")}},
        "routing.experts.skip_ratio: must be a finite number",
    ),
    "nested": (
        {"depth": {"skip": {"mlp": [[[[[[[1]]]]]]]}}},
        "routing is nested over 8 levels deep",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_words(name: str) -> None:
    routing, message = SAID[name]
    with pytest.raises(RoutingError) as caught:
        parse_routing(routing)
    assert caught.value.message == message
    assert caught.value.reason == "invalid_field"


@pytest.mark.parametrize(
    "routing",
    [
        {"experts": {"bias": [{"layer": "a", "expert": [], "value": None}] * 32_000}},
        {"experts": {"bias": [{"layer": 0, "expert": 0, "value": 0.5}] * 70_000}},
        {"experts": {"deactivate": [{"layer": 0, "experts": ["x"] * 4000}] * 40}},
        {"k" * 300_000: 1},
        {"depth": {"k" * 300_000: 1}},
        {"experts": {"remix": {"method": "mode", "pathway": [["x"] * 1000] * 150}}},
        {"depth": {"skip": {"blocks": ["x"] * 100_000}}},
        {"\ud800": 1},
        {"depth": {"exit": {"method": "confidence", "\ud800" * 1000: 1}}},
    ],
)
def test_an_answer_is_short_and_can_be_sent(routing: Any) -> None:
    with pytest.raises(RoutingError) as caught:
        parse_routing(routing)
    assert len(json.dumps(caught.value.body(), ensure_ascii=False).encode()) < 2000


@pytest.mark.parametrize(
    ("routing", "same"),
    [
        ({"depth": None, "experts": None, "effort": None, "preset": None, "report": None}, {}),
        ({"depth": {"skip": None, "exit": None, "adaptive": None, "phase": None}}, {"depth": {}}),
        (
            {"depth": {"skip": {"blocks": None, "mlp": [1], "by": None}}},
            {"depth": {"skip": {"mlp": [1]}}},
        ),
        (
            {"depth": {"exit": {"method": "entropy", "threshold": None, "layers": None}}},
            {"depth": {"exit": {"method": "entropy"}}},
        ),
        ({"experts": {"top_k": None, "bias": None}}, {"experts": {}}),
    ],
)
def test_null_is_not_given(routing: Any, same: Any) -> None:
    assert parse_routing(routing) == parse_routing(same)
