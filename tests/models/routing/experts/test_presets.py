"""`routing.experts` of a request over that of its preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import EXPERTS, MOE, MOE_PROFILED, expert_policy, experts, named, policy, refused

from sluice.models.policy.experts import ExpertPolicy

PRESET = {
    "experts": {
        "deactivate": [{"layer": 2, "experts": [1]}],
        "mode": "drop",
        "top_k": 2,
        "skip_ratio": 0.5,
        "protect_super_experts": False,
    }
}
BASE = ExpertPolicy(dropped=((2, 1),), top_k=2, skip_ratio=0.5, protect=False)

MERGED: dict[str, tuple[dict[str, Any], ExpertPolicy]] = {
    "nothing given": ({}, BASE),
    "null is not given": ({"top_k": None, "deactivate": None}, BASE),
    "one number": ({"top_k": 4}, replace(BASE, top_k=4)),
    "a number taken back": ({"top_k": 3}, replace(BASE, top_k=None)),
    "deactivate brings its own mode": (
        {"deactivate": named(4, 0)},
        replace(BASE, dropped=(), masked=((4, 0),)),
    ),
    "an empty list takes back": ({"deactivate": []}, replace(BASE, dropped=())),
    "another control": ({"top_p": 0.5}, replace(BASE, top_p=0.5)),
    "protection": ({"protect_super_experts": True}, replace(BASE, protect=True)),
}


@pytest.mark.parametrize("name", MERGED)
def test_each_field_of_the_request_replaces_the_presets(name: str) -> None:
    fields, expected = MERGED[name]
    assert expert_policy(MOE, PRESET, **fields) == expected


def test_a_preset_without_experts_and_a_request_without_them() -> None:
    assert policy({}, MOE, PRESET).experts == BASE
    assert expert_policy(MOE_PROFILED, {"effort": 0.7}, top_k=2) == ExpertPolicy(top_k=2)


MASKING = {"experts": {"deactivate": named(2, 1), "top_k": 2}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "drop"}, (f"{EXPERTS}.mode", "invalid_field")),
        ({"activate": named(2, 1)}, (f"{EXPERTS}.activate.0.experts.0", "unsupported_combination")),
        ({"budget": {"method": "oea", "k0": 3}}, (f"{EXPERTS}.budget.k0", "invalid_field")),
        ({"contrast": {"weak_rank": 1}}, (f"{EXPERTS}.contrast", "unsupported_combination")),
    ],
)
def test_a_field_beside_a_preset_that_excludes_it(
    fields: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert refused(experts(**fields), MOE, MASKING) == expected
