"""`depth.skip.adapter`: the skip set that it was trained for, and nothing beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    CAPABILITIES,
    CONFIDENT,
    EFFORT,
    PHASE,
    PROFILE,
    PROFILED,
    SKIP_PARAM,
    changed,
    depth,
    policy,
    refused,
)
from support.full_profile import ADAPTER

from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError

TRAINED: Capabilities = replace(
    CAPABILITIES,
    profile=changed(
        PROFILE,
        adapters={
            "small": {**ADAPTER, "attention": (1, 3), "mlp": (1,)},
            "whole": {**ADAPTER, "attention": (2,), "mlp": (2,), "phase": "both"},
        },
    ),
)
SMALL = SkipSet.of(attention=(1, 3), mlp=(1,), phase=Phase.DECODE, adapter="small")


def adapted(name: str = "small", **fields: Any) -> dict[str, Any]:
    return depth(skip={"adapter": name}, **fields)


def test_it_leaves_out_what_it_was_trained_for() -> None:
    assert policy(adapted(), TRAINED) == RoutingPolicy(SMALL)
    assert policy(adapted(phase="decode"), TRAINED) == RoutingPolicy(SMALL)
    assert policy(adapted("whole"), TRAINED).skip == SkipSet.of(blocks=(2,), adapter="whole")


def test_a_policy_travels_with_its_adapter() -> None:
    own = policy(adapted(), TRAINED)
    assert RoutingPolicy.from_dict(own.to_dict()) == own
    bare = RoutingPolicy(replace(own.skip, adapter=""))
    assert own.digest != bare.digest, "they must not share K/V"


def test_a_preset_may_have_one_and_a_request_replaces_it() -> None:
    preset = adapted()
    assert policy({}, TRAINED, preset).skip == SMALL
    other = policy(depth(skip={"blocks": [4]}), TRAINED, preset)
    assert other.skip == SkipSet.of(blocks=(4,))


@pytest.mark.parametrize(
    ("routing", "param", "reason"),
    [
        (adapted("unknown"), f"{SKIP_PARAM}.adapter", "needs_profile"),
        (adapted(phase="both"), PHASE, "invalid_field"),
        (depth(skip={"adapter": "small", "mlp": [1]}), f"{SKIP_PARAM}.mlp", "invalid_field"),
        (
            depth(skip={"adapter": "small", "fraction": 0.5, "by": "block"}),
            f"{SKIP_PARAM}.fraction",
            "invalid_field",
        ),
        (adapted(exit=CONFIDENT), f"{SKIP_PARAM}.adapter", "unsupported_combination"),
        (
            adapted(exit={"method": "fixed", "layers": [2]}),
            f"{SKIP_PARAM}.adapter",
            "unsupported_combination",
        ),
        ({**adapted(), "effort": 0.5}, EFFORT, "unsupported_combination"),
    ],
)
def test_refusals(routing: dict[str, Any], param: str, reason: str) -> None:
    assert refused(routing, TRAINED) == (param, reason)


def test_a_profile_without_any_says_how_to_train_one() -> None:
    with pytest.raises(RoutingError, match="`sluice calibrate recover` trains them"):
        policy(adapted(), PROFILED)
