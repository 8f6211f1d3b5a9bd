"""Policies as values: canonical form, digests, salts, and the table of live ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.masks import FULL_DEPTH, DepthMask, MaskTable, phase_masks
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


def test_no_ticket_is_stock() -> None:
    assert RoutingExtraArgs.from_extra_args(None) is None
    assert RoutingExtraArgs.from_extra_args({"other": 1}) is None


def exits(kv: MissingKV) -> RoutingPolicy:
    return RoutingPolicy(exit=ExitRule("confidence", (1, 2), threshold=0.5, kv=kv))


def adapts(method: str, **fields: object) -> RoutingPolicy:
    return RoutingPolicy(adaptive=AdaptiveRule(method, **fields))


def chooses(**controls: object) -> RoutingPolicy:
    return RoutingPolicy(experts=ExpertPolicy(**controls))


SUPPLIED = Remix(RemixMethod.SUPPLIED, RemixScope.LAST, 0.5, (0,), 4, pathway=((1.0, 0.0),))


@pytest.mark.parametrize(
    ("policy", "prompt", "generated"),
    [
        (RoutingPolicy(), False, False),
        (RoutingPolicy(SkipSet.of(mlp=(1,))), True, False),
        (RoutingPolicy(SkipSet.of(mlp=(1,), phase=Phase.PREFILL)), True, True),
        (RoutingPolicy(SkipSet.of(mlp=(1,), phase=Phase.DECODE)), False, True),
        (RoutingPolicy(SkipSet.of(mlp=(1,), elastic=True)), True, True),
        (exits(MissingKV.PROPAGATE), False, True),
        (exits(MissingKV.RECOMPUTE), False, False),
        (adapts("first", threshold=0.5), False, True),
        (adapts("first", threshold=0.5, masked_prefill=True), True, True),
        (adapts("similarity", budget=0.5), False, True),
        (adapts("lac", mode="predict", threshold=0.8), False, True),
        (adapts("lac", mode="readout", threshold=0.8), False, False),
        (adapts("lac", mode="replace", threshold=0.8), True, False),
        (adapts("mod"), True, True),
        (chooses(masked=((0, 1),)), True, False),
        (chooses(dropped=((0, 1),)), True, False),
        (chooses(forced=((0, 1, None),)), True, False),
        (chooses(bias=((0, 1, 0.5),)), True, False),
        (chooses(top_k=1), True, False),
        (chooses(top_p=0.5), True, False),
        (chooses(skip_ratio=0.5), True, False),
        (chooses(budget=ExpertBudget(BudgetMethod.OEA, k0=1)), False, True),
        (chooses(remix=SUPPLIED), False, True),
        (chooses(top_k=1, remix=SUPPLIED), True, True),
        (chooses(contrast=Contrast(1, 0.5, 0.1)), False, False),
    ],
)
def test_what_changes_keys_and_values(policy: RoutingPolicy, prompt: bool, generated: bool) -> None:
    assert (policy.prompt_kv_digest is not None) == prompt
    assert policy.private_generated == generated
    extra = RoutingExtraArgs(policy, "key")
    assert RoutingExtraArgs.decode(extra.encode()) == extra
    assert (extra.cache_salt(None) is not None) == prompt


def test_a_remix_keeps_the_last_prompt_token_to_itself() -> None:
    assert chooses(remix=SUPPLIED).private_last_prompt
    for policy in (chooses(top_k=1), chooses(contrast=Contrast(1, 0.5, 0.1)), adapts("mod")):
        assert not policy.private_last_prompt


def test_a_contrast_reads_its_whole_prompt() -> None:
    assert chooses(contrast=Contrast(1, 0.5, 0.1)).reads_whole_prompt
    assert not chooses(remix=SUPPLIED).reads_whole_prompt


def test_prompts_that_no_other_request_may_share() -> None:
    """Their K/V depend on later prompt tokens: only samples of one request have equal salts."""
    mod = adapts("mod")
    assert RoutingExtraArgs(mod, "a").cache_salt(None) == RoutingExtraArgs(mod, "a").cache_salt(
        None
    )
    assert RoutingExtraArgs(mod, "a").cache_salt(None) != RoutingExtraArgs(mod, "b").cache_salt(
        None
    )
    skip = RoutingPolicy(SkipSet.of(mlp=(1,)))
    assert RoutingExtraArgs(skip, "a").cache_salt(None) == RoutingExtraArgs(skip, "b").cache_salt(
        None
    )


def test_report_changes_no_digest() -> None:
    skip = SkipSet.of(blocks=(1,))
    assert RoutingPolicy(skip, report=True).digest == RoutingPolicy(skip).digest


def test_salts_differ_by_policy_and_by_client() -> None:
    policies = [RoutingPolicy(), RoutingPolicy(SkipSet.of(mlp=(1,))), adapts("mod")]
    extras = [RoutingExtraArgs(policy, "key") for policy in policies]
    salts = {extra.cache_salt(client) for extra in extras for client in (None, "x", "y")}
    assert len(salts) == 9
    assert extras[0].cache_salt("x") == "x"
    assert all(salt is None or len(salt) <= 128 for salt in salts)


def test_table_shares_rows_and_reuses_them() -> None:
    table = MaskTable(8)
    first, second, third = (phase_masks(SkipSet.of(mlp=(layer,)), 8)[0] for layer in (1, 2, 3))
    assert table.acquire(DepthMask.full(8)) == FULL_DEPTH
    row = table.acquire(first)
    assert table.acquire(first) == row
    assert table.acquire(second) != row
    assert not table.release(row)
    assert table.acquire(first) == row
    assert not table.release(row)
    assert table.release(row)
    assert not table.release(FULL_DEPTH)
    assert table.acquire(third) == row
    assert table.mask(row).key == third.key
    assert table.skip[row].tolist() == third.skip.tolist()
    assert len(table.skip) == len(table.fill) == 3
