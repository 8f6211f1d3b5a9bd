"""Exit thresholds that the profile has: when a request may leave its own out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    ALL_EXITS,
    CAPABILITIES,
    EXIT,
    LAYERS,
    PROFILE,
    PROFILED,
    changed,
    depth,
    policy,
    refused,
)
from support.full_profile import EXIT as ENTRY

from sluice.models.policy.policy import ExitRule, MissingKV
from sluice.models.routing.errors import RoutingError
from sluice.server.http.listing import capabilities_listing

TWO = {**ENTRY, "layers": (1, 3), "threshold": 0.75}
DEEP = {**ENTRY, "layers": (3, 4), "threshold": 0.625}
TRAINED = {**ENTRY, "method": "q_exit", "layers": ALL_EXITS, "threshold": 0.25}
CALIBRATED = replace(
    CAPABILITIES,
    profile=replace(changed(PROFILE, exits=[TWO, TRAINED, DEEP]), methods={"q_exit"}),
)
REFUSED = (f"{EXIT}.threshold", "invalid_field")


def leaving(**fields: Any) -> dict[str, Any]:
    return depth(exit={"method": "confidence", **fields})


GOOD: dict[str, tuple[dict[str, Any], ExitRule]] = {
    "neither": (leaving(), ExitRule("confidence", (1, 3), threshold=0.75)),
    "the calibrated layers": (
        leaving(layers=[3, 1]),
        ExitRule("confidence", (1, 3), threshold=0.75),
    ),
    "those of another entry": (
        leaving(layers=[3, 4]),
        ExitRule("confidence", (3, 4), threshold=0.625),
    ),
    "those of another entry, by the first": (
        leaving(min_layer=3),
        ExitRule("confidence", (3, 4), threshold=0.625),
    ),
    "a trained head": (
        depth(exit={"method": "q_exit"}),
        ExitRule("q_exit", ALL_EXITS, threshold=0.25),
    ),
    "recompute": (
        leaving(kv="recompute"),
        ExitRule("confidence", (1, 3), threshold=0.75, kv=MissingKV.RECOMPUTE),
    ),
    "a threshold of its own": (
        leaving(threshold=0.5),
        ExitRule("confidence", ALL_EXITS, threshold=0.5),
    ),
    "both of its own": (
        leaving(threshold=0.5, layers=[0]),
        ExitRule("confidence", (0,), threshold=0.5),
    ),
    "a threshold of its own with a decay": (
        leaving(threshold=0.5, decay=4),
        ExitRule("confidence", ALL_EXITS, threshold=0.5, decay=4.0),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_where_threshold_and_layers_come_from(name: str) -> None:
    routing, expected = GOOD[name]
    assert policy(routing, CALIBRATED).exit == expected


def test_a_preset_may_leave_them_to_the_profile() -> None:
    assert policy({}, CALIBRATED, leaving()).exit == ExitRule("confidence", (1, 3), threshold=0.75)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"layers": [1]}, "1"),
        ({"layers": [0, 1, 3]}, "0, 1, 3"),
        ({"min_layer": 1}, "1, 2, 3, 4"),
        ({"min_layer": 0}, "0, 1, 2, 3, 4"),
        ({"layers": [4], "min_layer": 4}, "4"),
    ],
)
def test_a_threshold_holds_for_its_layers_alone(fields: dict[str, Any], asked: str) -> None:
    assert refused(leaving(**fields), CALIBRATED) == REFUSED
    with pytest.raises(RoutingError, match=f"after layers 1, 3 or 3, 4, and these are {asked}:"):
        policy(leaving(**fields), CALIBRATED)


def test_a_default_of_the_method_gives_way_to_what_was_calibrated() -> None:
    trained = {"method": "q_exit", "layers": [2]}
    assert refused(depth(exit=trained), CALIBRATED) == REFUSED
    uncalibrated = replace(CALIBRATED, profile=changed(CALIBRATED.profile, exits=[]))  # type: ignore[arg-type]
    assert policy(depth(exit=trained), uncalibrated).exit == ExitRule("q_exit", (2,), threshold=0.5)


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (leaving(decay=4), REFUSED),
        (depth(exit={"method": "entropy"}), REFUSED),
        (leaving(layers=[]), (f"{EXIT}.layers", "invalid_field")),
        (leaving(layers=[LAYERS]), (f"{EXIT}.layers.0", "layer_out_of_range")),
        (leaving(min_layer=2, layers=[1, 3]), (f"{EXIT}.layers.0", "invalid_field")),
        (depth(exit={"method": "patience", "layers": [1]}), (f"{EXIT}.patience", "invalid_field")),
    ],
    ids=["decay", "no entry", "no layer", "no such layer", "below min_layer", "patience"],
)
def test_what_is_refused(routing: dict[str, Any], expected: tuple[str, str]) -> None:
    assert refused(routing, CALIBRATED) == expected


def test_without_an_entry_a_threshold_is_needed() -> None:
    assert refused(leaving(), PROFILED) == REFUSED


def test_capabilities_list_them_with_their_risk() -> None:
    exits = capabilities_listing(CALIBRATED)["depth"]["exit"]
    assert exits["confidence"]["parameters"]["threshold"] == {
        "low": 0.0,
        "high": 1.0,
        "default": 0.75,
        "integer": False,
    }
    first, second = exits["confidence"]["calibrated"]
    assert first == {
        "layers": [1, 3],
        "threshold": 0.75,
        "tolerance": 0.01,
        "error": 0.05,
        "agreement": 0.995,
        "mean_layers": 1.5,
    }
    assert second["layers"] == [3, 4]
    assert exits["q_exit"]["parameters"]["threshold"]["default"] == 0.25
    assert exits["entropy"]["calibrated"] == exits["fixed"]["calibrated"] == []
    assert exits["entropy"]["parameters"]["threshold"]["default"] is None
    # What is listed is what a request gets.
    for listed in (first, second):
        rule = policy(leaving(layers=listed["layers"]), CALIBRATED).exit
        assert rule is not None
        assert rule.number("threshold") == listed["threshold"]
