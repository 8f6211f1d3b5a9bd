"""`routing.experts.contrast`: what it becomes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    CONFIDENT,
    EXPERTS,
    GROUPED,
    HUGE,
    MOE,
    MOE_PROFILED,
    depth,
    experts,
    named,
    policy,
    refused,
)

from sluice.models.policy.experts import Contrast, ExpertPolicy
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.routing.errors import RoutingError

Fields = dict[str, Any]
CONTRAST = f"{EXPERTS}.contrast"
INVALID, COMBINATION = "invalid_field", "unsupported_combination"
SUPPLIED = {"method": "supplied", "pathway": [[1] * 8] * 5}


def contrast(rank: Any = 1, **fields: Any) -> Fields:
    return {"contrast": {"weak_rank": rank, **fields}}


GOOD: dict[str, tuple[Fields, ExpertPolicy]] = {
    "contrast": (
        {"contrast": {"weak_rank": 2}},
        ExpertPolicy(contrast=Contrast(weak_rank=2, beta=0.5, alpha=0.1)),
    ),
    "contrast with its numbers": (
        {"contrast": {"weak_rank": 7, "beta": 0, "alpha": 1}},
        ExpertPolicy(contrast=Contrast(weak_rank=7, beta=0.0, alpha=1.0)),
    ),
    "contrast beside what changes nothing": (
        {"contrast": {"weak_rank": 0}, "top_k": 3, "deactivate": []},
        ExpertPolicy(contrast=Contrast(weak_rank=0, beta=0.5, alpha=0.1)),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_resolved(name: str) -> None:
    fields, expected = GOOD[name]
    resolved = policy(experts(**fields), MOE)
    assert resolved == RoutingPolicy(experts=expected)
    assert RoutingPolicy.from_dict(resolved.to_dict()) == resolved


def test_beside_an_empty_skip_set() -> None:
    assert not policy({**depth(skip={}), **experts(**contrast())}, MOE).stock


BAD: dict[str, tuple[Fields, str, str]] = {
    "contrast without a rank": ({"contrast": {}}, f"{CONTRAST}.weak_rank", INVALID),
    "negative rank": (contrast(-1), f"{CONTRAST}.weak_rank", INVALID),
    "rank behind the last": (contrast(8), f"{CONTRAST}.weak_rank", INVALID),
    "huge rank": (contrast(HUGE), f"{CONTRAST}.weak_rank", INVALID),
    "negative beta": (contrast(beta=-0.5), f"{CONTRAST}.beta", INVALID),
    "infinite beta": (contrast(beta=float("inf")), f"{CONTRAST}.beta", INVALID),
    "beta beyond fp32": (contrast(beta=1e39), f"{CONTRAST}.beta", INVALID),
    "contrast alpha 0": (contrast(alpha=0), f"{CONTRAST}.alpha", INVALID),
    "contrast alpha over 1": (contrast(alpha=2), f"{CONTRAST}.alpha", INVALID),
    **{
        f"contrast and {name}": ({**contrast(), **other}, CONTRAST, COMBINATION)
        for name, other in {
            "deactivate": {"deactivate": named(2, 1)},
            "drop": {"deactivate": named(2, 1), "mode": "drop"},
            "activate": {"activate": named(2, 1)},
            "bias": {"bias": [{"layer": 2, "expert": 1, "value": 1}]},
            "top_k": {"top_k": 2},
            "top_p": {"top_p": 0.5},
            "skip_ratio": {"skip_ratio": 0.5},
            "budget": {"budget": {"method": "oea", "k0": 1}},
            "remix": {"remix": SUPPLIED},
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    fields, *expected = BAD[name]
    assert [*refused(experts(**fields), MOE)] == expected


def test_groups_hold_fewer_ranks() -> None:
    assert policy(experts(**contrast(7)), GROUPED).experts.contrast is not None
    assert refused(experts(**contrast(8)), GROUPED) == (f"{CONTRAST}.weak_rank", INVALID)


def test_a_cache_too_small_for_two_passes() -> None:
    small = replace(MOE, contrast_refusal="the K/V cache holds 8 tokens")
    with pytest.raises(RoutingError, match="holds 8 tokens") as caught:
        policy(experts(**contrast()), small)
    assert (caught.value.param, caught.value.reason) == (CONTRAST, "unsupported_model")


@pytest.mark.parametrize(
    "other",
    [
        depth(skip={"mlp": [2]}),
        depth(exit=CONFIDENT),
        depth(exit={"method": "fixed", "layers": [3]}),
        depth(adaptive={"method": "lac"}),
        {"effort": 0.7},
        {"effort": 1},
    ],
)
def test_contrast_goes_with_no_depth(other: dict[str, Any]) -> None:
    assert refused({**other, **experts(**contrast())}, MOE_PROFILED) == (CONTRAST, COMBINATION)
