"""What capabilities say of the profile: every value can be copied into a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    CAPABILITIES,
    HIDDEN,
    LAYERS,
    MOE,
    PROFILE,
    PROFILED,
    changed,
    depth,
    policy,
)
from support.full_profile import MEASURED, frontier, level

from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.routing.capabilities import Capabilities

LEVELS = [level(0.75, (5,), (4, 5)), level(0.5, (3, 4, 5), (3, 4, 5))]
RATIOS = (0.0, 0.5, 0.25, 0.125, 0.5, 1.0)
FOUND = replace(
    MOE,
    profile=changed(
        PROFILE,
        behaviours={
            "refusal": {
                "experts": ((3, 7), (0, 1)),
                "scores": (0.5, 0.25),
                "measure": "weight",
                "prompts": (9, 8),
            }
        },
        skip_sets={"a": {"attention": (1, 4), "mlp": (2,), "quality": 0.99, "seconds": 0.75}},
        expert_k=[{"budget": 9, "top_k": (1, 1, 2, 2, 2, 2), "divergence": 0.5}],
        skip_ratios=RATIOS,
        frontier=frontier(effort=LEVELS),
    ),
)


def routing_of(capabilities: Capabilities) -> dict[str, Any]:
    found: dict[str, Any] = capabilities.to_wire()["experts_routing"]
    return found


def test_behaviours_are_experts_to_deactivate() -> None:
    (name, found), *_ = routing_of(FOUND)["behaviours"].items()
    assert name == "refusal"
    assert found == {
        "experts": [[3, 7], [0, 1]],
        "scores": [0.5, 0.25],
        "measure": "weight",
        "prompts": [9, 8],
    }
    masked = [{"layer": layer, "experts": [expert]} for layer, expert in found["experts"]]
    asked = policy({"experts": {"deactivate": masked}}, FOUND).experts
    assert asked == ExpertPolicy(masked=((0, 1), (3, 7)))


def test_experts_per_layer_and_skip_ratios_go_into_a_request() -> None:
    listed = routing_of(FOUND)
    (found,) = listed["expert_k"]
    assert found == {"budget": 9, "top_k": [1, 1, 2, 2, 2, 2], "divergence": 0.5}
    asked = {"top_k": found["top_k"], "skip_ratio": listed["skip_ratios"]}
    resolved = policy({"experts": asked}, FOUND).experts
    assert resolved == ExpertPolicy(top_k=(1, 1, 2, 2, 2, 2), skip_ratio=RATIOS)


def test_skip_sets_go_into_a_request() -> None:
    found = FOUND.to_wire()["depth"]["skip"]["sets"]
    assert found == {"a": {"attention": [1, 4], "mlp": [2], "quality": 0.99, "seconds": 0.75}}
    sets = {name: found["a"][name] for name in ("attention", "mlp")}
    expected = SkipSet.of(attention=(1, 4), mlp=(2,), phase=Phase.DECODE)
    assert policy(depth(skip=sets, phase="decode"), FOUND).skip == expected


def test_where_effort_comes_from() -> None:
    found = FOUND.to_wire()["effort"]
    assert (found["source"], found["lowest"], found["measure"]) == ("frontier", 0.5, "exact match")
    assert found["levels"] == [
        {"effort": 0.75, "attention": [5], "mlp": [4, 5], "quality": MEASURED},
        {"effort": 0.5, "attention": [3, 4, 5], "mlp": [3, 4, 5], "quality": MEASURED},
    ]


@pytest.mark.parametrize(
    ("capabilities", "source"),
    [
        (FOUND, "frontier"),
        (PROFILED, "importance"),
        (CAPABILITIES, "default"),
        (replace(CAPABILITIES, profile=changed(PROFILE, importance=None)), "default"),
        (replace(CAPABILITIES, profile=changed(PROFILE, frontier=frontier())), "importance"),
    ],
    ids=["frontier", "importance", "no profile", "neither", "no levels"],
)
def test_the_lowest_effort_that_is_listed_can_be_asked(
    capabilities: Capabilities, source: str
) -> None:
    found = capabilities.to_wire()["effort"]
    assert found["source"] == source
    skip = policy({"effort": found["lowest"]}, capabilities).skip
    assert 0 < len(skip.attention) < LAYERS
    if source != "frontier":
        assert found["levels"] == []
        assert len(skip.attention) == LAYERS - 1


def test_a_profile_without_all_that() -> None:
    for capabilities in (CAPABILITIES, PROFILED):
        listed = routing_of(capabilities)
        assert (listed["behaviours"], listed["expert_k"]) == ({}, [])
        assert listed["skip_ratios"] is None
        wire = capabilities.to_wire()
        assert wire["hidden_size"] == HIDDEN
        assert wire["depth"]["skip"]["sets"] == {}
