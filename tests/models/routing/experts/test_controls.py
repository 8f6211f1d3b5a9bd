"""Every form of `routing.experts`: the `ExpertPolicy` it becomes."""

from __future__ import annotations

from typing import Any

import pytest
from support.edge import (
    CAPABILITIES,
    DENSE_LAYER,
    GROUPED,
    LAYERS,
    MOE,
    MOE_PROFILED,
    PLAIN_SHAPE,
    depth,
    expert_policy,
    experts,
    named,
    policy,
)

from sluice.models.policy.experts import STOCK_EXPERTS, BudgetMethod, ExpertBudget, ExpertPolicy
from sluice.models.policy.policy import RoutingPolicy, SkipSet

GOOD: dict[str, tuple[dict[str, Any], ExpertPolicy]] = {
    "nothing": ({}, STOCK_EXPERTS),
    "nothing, at length": (
        {"deactivate": [], "activate": [], "bias": [], "protect_super_experts": False},
        STOCK_EXPERTS,
    ),
    "nulls": (
        {"deactivate": None, "mode": None, "top_k": None, "remix": None, "contrast": None},
        STOCK_EXPERTS,
    ),
    "entries that name nothing": (
        {"deactivate": named(2), "mode": "drop", "activate": named(3, weight=2)},
        STOCK_EXPERTS,
    ),
    "masked, in order": (
        {"deactivate": [*named(4, 7, 2), *named(0, 5), *named(4, 0)]},
        ExpertPolicy(masked=((0, 5), (4, 0), (4, 2), (4, 7))),
    ),
    "masked by name": (
        {"deactivate": named(2, 1), "mode": "mask"},
        ExpertPolicy(masked=((2, 1),)),
    ),
    "as few as a token has": (
        {"deactivate": named(2, 0, 1, 2, 3, 4)},
        ExpertPolicy(masked=tuple((2, e) for e in range(5))),
    ),
    "fewer where a token has fewer": (
        {"deactivate": named(2, 0, 1, 2, 3, 4, 5, 6), "top_k": [3, 3, 1, 3, 3, 3]},
        ExpertPolicy(masked=tuple((2, e) for e in range(7)), top_k=(3, 3, 1, 3, 3, 3)),
    ),
    "dropped": (
        {"deactivate": [*named(5, 3, 2), *named(2, 1)], "mode": "drop"},
        ExpertPolicy(dropped=((2, 1), (5, 2), (5, 3))),
    ),
    "dropped beside the leading choices of a budget": (
        {
            "deactivate": named(5, 3),
            "mode": "drop",
            "budget": {"method": "oea", "k0": 2},
        },
        ExpertPolicy(dropped=((5, 3),), budget=ExpertBudget(BudgetMethod.OEA, k0=2)),
    ),
    "forced, each entry with its weight": (
        {"activate": [*named(3, 6, 1, weight=0.25), *named(0, 2), *named(3, 0, weight=2)]},
        ExpertPolicy(forced=((0, 2, None), (3, 0, 2.0), (3, 1, 0.25), (3, 6, 0.25))),
    ),
    "forced beside masked": (
        {"activate": named(3, 6), "deactivate": named(3, 5)},
        ExpertPolicy(forced=((3, 6, None),), masked=((3, 5),)),
    ),
    "biases without zeros": (
        {
            "bias": [
                {"layer": 3, "expert": 2, "value": -0.5},
                {"layer": 3, "expert": 1, "value": 0},
                {"layer": 0, "expert": 7, "value": 2},
            ]
        },
        ExpertPolicy(bias=((0, 7, 2.0), (3, 2, -0.5))),
    ),
    "a bias of zero": ({"bias": [{"layer": 3, "expert": 1, "value": -0.0}]}, STOCK_EXPERTS),
    "top_k": ({"top_k": 1}, ExpertPolicy(top_k=1)),
    "all experts": ({"top_k": 8}, ExpertPolicy(top_k=8)),
    "the model's own top_k": ({"top_k": 3}, STOCK_EXPERTS),
    "the model's own, layer by layer": ({"top_k": [3, 8, 3, 3, 3, 3]}, STOCK_EXPERTS),
    "one number, layer by layer": ({"top_k": [2, 1, 2, 2, 2, 2]}, ExpertPolicy(top_k=2)),
    "top_k by layer": ({"top_k": [2, 1, 3, 2, 2, 4]}, ExpertPolicy(top_k=(2, 1, 3, 2, 2, 4))),
    "top_p": ({"top_p": 0.75}, ExpertPolicy(top_p=0.75)),
    "a top_p that keeps all": ({"top_p": 1}, STOCK_EXPERTS),
    "skip_ratio": ({"skip_ratio": 1}, ExpertPolicy(skip_ratio=1.0)),
    "a ratio that cuts nothing": ({"skip_ratio": 0}, STOCK_EXPERTS),
    "the same, layer by layer": ({"skip_ratio": [0, 0.5, 0, 0, 0, 0]}, STOCK_EXPERTS),
    "one ratio, layer by layer": (
        {"skip_ratio": [0.5, 0, 0.5, 0.5, 0.5, 0.5]},
        ExpertPolicy(skip_ratio=0.5),
    ),
    "ratios by layer": (
        {"skip_ratio": [0.5, 0, 0, 0.5, 1, 0.5]},
        ExpertPolicy(skip_ratio=(0.5, 0.0, 0.0, 0.5, 1.0, 0.5)),
    ),
    "oea": (
        {"budget": {"method": "oea", "k0": 3}},
        ExpertPolicy(budget=ExpertBudget(BudgetMethod.OEA, k0=3)),
    ),
    "oea beside more experts per token": (
        {"budget": {"method": "oea", "k0": 4}, "top_k": 5},
        ExpertPolicy(budget=ExpertBudget(BudgetMethod.OEA, k0=4), top_k=5),
    ),
    "xshare": (
        {"budget": {"method": "xshare", "experts": 1}},
        ExpertPolicy(budget=ExpertBudget(BudgetMethod.XSHARE, experts=1)),
    ),
    "lynx": (
        {"budget": {"method": "lynx", "experts": 8}},
        ExpertPolicy(budget=ExpertBudget(BudgetMethod.LYNX, experts=8)),
    ),
    "unprotected, and nothing to protect from": (
        {"top_k": 3, "protect_super_experts": False},
        STOCK_EXPERTS,
    ),
    "unprotected": (
        {"top_k": 2, "protect_super_experts": False},
        ExpertPolicy(top_k=2, protect=False),
    ),
    "protected by name": (
        {"top_k": 2, "protect_super_experts": True},
        ExpertPolicy(top_k=2),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_resolved(name: str) -> None:
    fields, expected = GOOD[name]
    resolved = policy(experts(**fields), MOE)
    assert resolved == RoutingPolicy(experts=expected)
    assert resolved.stock == (expected == STOCK_EXPERTS)
    assert RoutingPolicy.from_dict(resolved.to_dict()) == resolved


def test_super_experts_may_be_given_up() -> None:
    assert expert_policy(
        MOE_PROFILED, deactivate=named(3, 7), protect_super_experts=False
    ) == ExpertPolicy(masked=((3, 7),), protect=False)
    bias = [{"layer": 0, "expert": 1, "value": 1}]
    assert expert_policy(MOE_PROFILED, bias=bias) == ExpertPolicy(bias=((0, 1, 1.0),))
    assert expert_policy(MOE_PROFILED, activate=named(3, 7)).forced == ((3, 7, None),)


def test_groups() -> None:
    # Two of four groups are enough where each has two live experts.
    masked = (*range(8), 8, 9, 12, 13)
    assert expert_policy(GROUPED, deactivate=named(2, *masked)).masked == tuple(
        (2, e) for e in masked
    )
    # A forced expert opens its group, alone there or not.
    alone = (1, 2, 3, *range(4, 12))
    forced = expert_policy(GROUPED, deactivate=named(2, *alone), activate=named(2, 0), top_k=3)
    assert forced.forced == ((2, 0, None),)
    assert expert_policy(GROUPED, top_k=8).top_k == 8
    assert expert_policy(GROUPED, activate=named(1, 0, 15)).forced[1] == (1, 15, None)


def test_experts_beside_depth() -> None:
    routing = {**depth(skip={"blocks": [2]}), **experts(top_k=2)}
    assert policy(routing, MOE) == RoutingPolicy(
        SkipSet.of(blocks=(2,)), experts=ExpertPolicy(top_k=2)
    )
    routing = {"effort": 0.7, **experts(budget={"method": "oea", "k0": 1})}
    assert not policy(routing, MOE_PROFILED).skip.empty
    assert policy(routing, MOE_PROFILED).experts.budget is not None


def test_nothing_asked_of_a_dense_model() -> None:
    assert policy(experts(deactivate=[], protect_super_experts=True), CAPABILITIES).stock


def test_equal_wishes_have_equal_digests() -> None:
    one = policy(experts(deactivate=named(3, 4, 2), top_k=[2] * LAYERS), MOE)
    other = policy(experts(deactivate=[*named(3, 2), *named(3, 4)], top_k=2, top_p=1.0), MOE)
    assert one.digest == other.digest
    assert DENSE_LAYER not in PLAIN_SHAPE.layers
