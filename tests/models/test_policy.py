"""Policies as values: canonical form, digests, salts, and the table of live ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.policy import (
    EXTRA_ARGS_KEY,
    Phase,
    PolicyTicket,
    RoutingPolicy,
    SkipSet,
    salted,
)
from sluice.models.policy_table import STOCK_ROW, PolicyTable

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


@pytest.mark.parametrize(
    ("skip", "prompt", "generated"),
    [
        (SkipSet(), False, False),
        (SkipSet.of(mlp=(1,)), True, False),
        (SkipSet.of(mlp=(1,), phase=Phase.PREFILL), True, True),
        (SkipSet.of(mlp=(1,), phase=Phase.DECODE), False, True),
    ],
)
def test_digests_name_what_changes_keys_and_values(
    skip: SkipSet, prompt: bool, generated: bool
) -> None:
    policy = RoutingPolicy(skip)
    assert (policy.prompt_kv_digest is not None) == prompt
    assert (policy.generated_kv_digest is not None) == generated


def test_report_changes_no_digest() -> None:
    skip = SkipSet.of(blocks=(1,))
    assert RoutingPolicy(skip, report=True).digest == RoutingPolicy(skip).digest


def test_salts_differ_by_policy_and_by_client() -> None:
    salts = {salted(digest, client) for digest in (None, "a", "b") for client in (None, "x", "y")}
    assert len(salts) == 9
    assert salted(None, "x") == "x"
    assert all(salt is None or len(salt) <= 128 for salt in salts)


def test_table_shares_rows_and_reuses_them() -> None:
    table = PolicyTable(8)
    first = RoutingPolicy(SkipSet.of(mlp=(1,)))
    second = RoutingPolicy(SkipSet.of(mlp=(2,)))
    assert table.acquire(RoutingPolicy()) == STOCK_ROW
    row = table.acquire(first)
    assert table.acquire(first) == row
    other = table.acquire(second)
    assert other != row
    assert not table.release(row)
    assert table.acquire(first) == row
    assert not table.release(row)
    assert table.release(row)
    assert not table.release(STOCK_ROW)
    third = table.acquire(RoutingPolicy(SkipSet.of(mlp=(3,))))
    assert third == row
    assert table.masks[row, :, 3, 1].all()
    assert not table.masks[row, :, 1, 1].any()
    assert len(table.masks) == 3
