"""Policies as values: canonical form, digests, salts, and the table of live ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.skip import DepthMask, phase_masks
from sluice.models.mask_table import FULL_DEPTH, MaskTable
from sluice.models.policy import (
    EXTRA_ARGS_KEY,
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    PolicyTicket,
    RoutingPolicy,
    SkipSet,
)

layer_lists = st.lists(st.integers(0, 7), max_size=4).map(tuple)
skips = st.builds(SkipSet.of, attention=layer_lists, mlp=layer_lists, phase=st.sampled_from(Phase))


def test_blocks_are_attention_and_mlp() -> None:
    assert SkipSet.of(blocks=(3, 1), mlp=(1, 2)) == SkipSet.of(attention=(1, 3), mlp=(3, 2, 1))


@given(skips)
def test_ticket_round_trip(skip: SkipSet) -> None:
    ticket = PolicyTicket(RoutingPolicy(skip), "key")
    decoded = PolicyTicket.from_extra_args({EXTRA_ARGS_KEY: ticket.encode()})
    assert decoded is not None
    assert decoded.record == "key"
    assert decoded.policy.to_dict() == ticket.policy.to_dict()
    assert decoded.policy.digest == ticket.policy.digest


def test_no_ticket_is_stock() -> None:
    assert PolicyTicket.from_extra_args(None) is None
    assert PolicyTicket.from_extra_args({"other": 1}) is None


def exits(kv: MissingKV) -> RoutingPolicy:
    return RoutingPolicy(exit=ExitRule("confidence", (1, 2), threshold=0.5, kv=kv))


def adapts(method: str, **fields: object) -> RoutingPolicy:
    return RoutingPolicy(adaptive=AdaptiveRule(method, **fields))


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
    ],
)
def test_what_changes_keys_and_values(policy: RoutingPolicy, prompt: bool, generated: bool) -> None:
    assert (policy.prompt_kv_digest is not None) == prompt
    assert policy.private_generated == generated
    ticket = PolicyTicket(policy, "key")
    assert PolicyTicket.decode(ticket.encode()) == ticket
    assert (ticket.cache_salt(None) is not None) == prompt


def test_prompts_that_no_other_request_may_share() -> None:
    """Their K/V depend on later prompt tokens: only samples of one request have equal salts."""
    mod = adapts("mod")
    assert PolicyTicket(mod, "a").cache_salt(None) == PolicyTicket(mod, "a").cache_salt(None)
    assert PolicyTicket(mod, "a").cache_salt(None) != PolicyTicket(mod, "b").cache_salt(None)
    skip = RoutingPolicy(SkipSet.of(mlp=(1,)))
    assert PolicyTicket(skip, "a").cache_salt(None) == PolicyTicket(skip, "b").cache_salt(None)


def test_report_changes_no_digest() -> None:
    skip = SkipSet.of(blocks=(1,))
    assert RoutingPolicy(skip, report=True).digest == RoutingPolicy(skip).digest


def test_salts_differ_by_policy_and_by_client() -> None:
    policies = [RoutingPolicy(), RoutingPolicy(SkipSet.of(mlp=(1,))), adapts("mod")]
    tickets = [PolicyTicket(policy, "key") for policy in policies]
    salts = {ticket.cache_salt(client) for ticket in tickets for client in (None, "x", "y")}
    assert len(salts) == 9
    assert tickets[0].cache_salt("x") == "x"
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
