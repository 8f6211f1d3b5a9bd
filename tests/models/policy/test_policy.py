"""Policies as values: canonical form and digests."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.policy.experts import (
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)

layer_lists = st.lists(st.integers(0, 7), max_size=4).map(tuple)
skips = st.builds(SkipSet.of, attention=layer_lists, mlp=layer_lists, phase=st.sampled_from(Phase))

numbers = st.floats(-1e6, 1e6, width=32)
shares = st.floats(0.0, 1.0)
places = st.tuples(st.integers(0, 7), st.integers(0, 63))
named = st.lists(places, max_size=3, unique=True).map(lambda ids: tuple(sorted(ids)))
layers = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True).map(sorted).map(tuple)
remixes = st.builds(
    Remix,
    method=st.sampled_from(RemixMethod),
    scope=st.sampled_from(RemixScope),
    alpha=shares,
    layers=layers,
    top=st.integers(1, 64),
    references=st.none() | st.text(max_size=8),
    neighbors=st.none() | st.integers(1, 9),
    kernel=st.sampled_from([None, "gaussian", "cosine"]),
    bandwidth=st.none() | shares,
    max_similarity=st.none() | shares,
    embedding=st.none() | st.lists(numbers, min_size=1, max_size=3).map(tuple),
    pathway=st.none() | st.just(((0.5, 0.5), (1.0, 0.0))),
)
experts = st.builds(
    ExpertPolicy,
    masked=named,
    dropped=named,
    forced=named.map(lambda ids: tuple((*each, None if each[1] % 2 else 0.5) for each in ids)),
    bias=named.map(lambda ids: tuple((*each, each[1] - 30.5) for each in ids)),
    top_k=st.none() | st.integers(1, 64) | st.just((1, 2, 3)),
    top_p=st.none() | shares,
    skip_ratio=st.none() | shares | st.just((0.0, 0.25)),
    budget=st.none()
    | st.builds(ExpertBudget, st.just(BudgetMethod.OEA), k0=st.integers(1, 8))
    | st.builds(
        ExpertBudget,
        st.sampled_from([BudgetMethod.XSHARE, BudgetMethod.LYNX]),
        experts=st.integers(1, 64),
    ),
    remix=st.none() | remixes,
    contrast=st.none() | st.builds(Contrast, st.integers(0, 7), numbers, shares),
    protect=st.booleans(),
)


def test_blocks_are_attention_and_mlp() -> None:
    assert SkipSet.of(blocks=(3, 1), mlp=(1, 2)) == SkipSet.of(attention=(1, 3), mlp=(3, 2, 1))


@given(skips)
def test_ticket_round_trip(skip: SkipSet) -> None:
    extra = RoutingExtraArgs(RoutingPolicy(skip), "key")
    decoded = RoutingExtraArgs.from_extra_args({EXTRA_ARGS_KEY: extra.encode()})
    assert decoded is not None
    assert decoded.request_key == "key"
    assert decoded.policy.to_dict() == extra.policy.to_dict()
    assert decoded.policy.digest == extra.policy.digest


@given(skips, experts)
def test_ticket_round_trip_of_experts(skip: SkipSet, own: ExpertPolicy) -> None:
    policy = RoutingPolicy(skip, experts=own)
    extra = RoutingExtraArgs(policy, "key")
    decoded = RoutingExtraArgs.from_extra_args({EXTRA_ARGS_KEY: extra.encode()})
    assert decoded is not None
    assert decoded.policy.experts == (ExpertPolicy() if own.empty else own)
    assert hash(decoded.policy.experts) == hash(ExpertPolicy() if own.empty else own)
    assert decoded.policy.digest == policy.digest
    assert (decoded.policy.digest == RoutingPolicy(skip).digest) == own.empty
    # The seam asks the text before it reads the policy.
    assert ('"contrast"' in extra.encode()) >= (own.contrast is not None)


@given(experts, experts)
def test_digests_name_expert_policies(first: ExpertPolicy, second: ExpertPolicy) -> None:
    digests = [RoutingPolicy(experts=own).digest for own in (first, second)]
    same = first == second or (first.empty and second.empty)
    assert (digests[0] == digests[1]) == same


RULES = [
    ExitRule("confidence", (1, 2), threshold=0.5),
    ExitRule("patience", (0,), patience=3, decay=4.0, kv=MissingKV.RECOMPUTE),
    ExitRule("replay", (1, 2), script=(2, 1)),
]
ADAPTIVE_RULES = [
    AdaptiveRule("mod"),
    AdaptiveRule("mod", retention=(1.0, 0.5)),
    AdaptiveRule("lac", mode="replace", threshold=0.0),
    AdaptiveRule("first", threshold=0.5, masked_prefill=True),
]


@pytest.mark.parametrize(
    "policy",
    [
        *(RoutingPolicy(exit=rule) for rule in RULES),
        *(RoutingPolicy(adaptive=rule) for rule in ADAPTIVE_RULES),
    ],
)
def test_rules_round_trip(policy: RoutingPolicy) -> None:
    wire = json.loads(json.dumps(policy.to_dict()))
    assert RoutingPolicy.from_dict(wire) == policy
    assert hash(RoutingPolicy.from_dict(wire)) == hash(policy)


def test_what_a_rule_holds() -> None:
    rule = AdaptiveRule("first", threshold=0.5, masked_prefill=False, budget=None)
    assert rule == AdaptiveRule("first", threshold=0.5)
    assert rule.to_dict() == {"method": "first", "threshold": 0.5}
    assert (rule.number("threshold"), rule.get("budget"), rule.numbers("retention")) == (
        0.5,
        None,
        (),
    )
    with pytest.raises(KeyError, match="budget"):
        rule.number("budget")


def test_no_ticket_is_stock() -> None:
    assert RoutingExtraArgs.from_extra_args(None) is None
    assert RoutingExtraArgs.from_extra_args({"other": 1}) is None


def test_report_changes_no_digest() -> None:
    skip = SkipSet.of(blocks=(1,))
    assert RoutingPolicy(skip, report=True).digest == RoutingPolicy(skip).digest


def test_the_worker_learns_whether_a_report_was_asked_for() -> None:
    for report in (True, False):
        text = RoutingExtraArgs(RoutingPolicy(report=report), "key").encode()
        assert RoutingExtraArgs.decode(text).policy.report is report
