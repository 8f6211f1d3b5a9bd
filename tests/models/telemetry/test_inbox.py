"""Sums of requests on their way to whoever answers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sluice.models.telemetry import inbox as module
from sluice.models.telemetry.inbox import Inbox
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.records import Records
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.telemetry.request_sums import RequestSums

LAYERS = 2
COST = ModuleCost(modules=np.ones((LAYERS, 2)), fill=np.ones(LAYERS))


def wire(exits: int) -> dict[str, object]:
    sums = RequestSums.zeros(LAYERS)
    sums.exits += exits
    return sums.to_wire()


def exits(record: RoutingRecord | None) -> int | None:
    return None if record is None else int(record.exits[0])


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_samples_are_waited_for_and_added_up() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        records = Records(inbox, COST, None)
        inbox.expect("0_a", "a")
        inbox.expect("1_a", "a")
        inbox.expect("b", "b")
        taking = asyncio.create_task(records.take("a"))
        inbox.arrive("1_a", wire(1))
        inbox.arrive("b", wire(7))
        await settled()
        assert not taking.done()
        inbox.arrive("0_a", wire(2))
        assert exits(await taking) == 3
        assert await records.take("a") is None, "once"
        assert exits(await records.take("b")) == 7

    asyncio.run(scenario())


def test_what_never_went_to_an_engine_or_reached_no_step_has_no_record() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        records = Records(inbox, COST, None)
        assert await records.take("never") is None
        inbox.expect("waited", "a")
        inbox.arrive("waited", None)
        inbox.arrive("somebody else's", wire(1))
        assert await records.take("a") is None

    asyncio.run(scenario())


def test_an_engine_that_dies_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        records = Records(inbox, COST, None)
        inbox.expect("0_a", "a")
        inbox.expect("1_a", "a")
        inbox.arrive("0_a", wire(2))
        taking = asyncio.create_task(records.take("a"))
        await settled()
        inbox.fail()
        assert exits(await taking) == 2, "what is known"
        inbox.expect("late", "late")
        assert await records.take("late") is None

    asyncio.run(scenario())


def test_records_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_RECORDS", 3)
    inbox = Inbox()
    for key in "abcde":
        inbox.expect(key, key)
        inbox.arrive(key, wire(1))
    assert [inbox.take(key) is not None for key in "abcde"] == [False, False, True, True, True]


def test_without_a_cost_there_is_no_record() -> None:
    inbox = Inbox()
    inbox.expect("a", "a")
    inbox.arrive("a", wire(1))
    assert Records(inbox, None, None).take_now("a") is None
