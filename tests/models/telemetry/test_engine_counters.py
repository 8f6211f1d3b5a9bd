"""Totals and windows of one engine, and which engines are at work."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from sluice.models.telemetry import engine_counters
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.engine_counters import EngineCounters, at_work
from sluice.models.telemetry.ledger import WINDOW_SECONDS

LAYERS = 3


def counts(rows: int, selected: int = 0) -> Counts:
    """`selected` of an expert in one layer; none are said where none are."""
    selections = np.array([[selected, 0, rows, 0]] * (selected > 0)).reshape(-1, 4)
    return Counts(np.full((LAYERS, 2, 3), rows), np.full(LAYERS, rows), selections)


def test_counts_cross_to_the_server_whole() -> None:
    for told in (counts(3, selected=2), counts(3), Counts.zeros(LAYERS)):
        came = Counts.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(told.to_wire())))
        for one, other in ((came, told), (came + counts(0, 1), told + counts(0, 1))):
            assert one.layers.tolist() == other.layers.tolist()
            assert one.exits.tolist() == other.exits.tolist()
            assert one.selections.tolist() == other.selections.tolist()


def test_the_window_forgets_and_the_total_does_not() -> None:
    counters = EngineCounters(Counts.zeros(LAYERS, 1, 2))
    windows = []
    for new_window in (True, False, False, True, False, True):
        counters.add(counts(1, selected=2), new_window=new_window)
        reading = counters.read()
        assert (reading.window.layers == reading.window.exits[0]).all()
        assert reading.window.by_expert.tolist() == [[2 * reading.window.exits[0], 0]]
        windows.append(int(reading.window.exits[0]))
    # Those of the current window and of the one before it.
    assert windows == [1, 2, 3, 4, 5, 3]
    assert counters.read().total.exits.tolist() == [6] * LAYERS
    assert counters.read().total.by_expert.tolist() == [[12, 0]]


def test_a_reading_stays_what_it_was() -> None:
    counters = EngineCounters(Counts.zeros(LAYERS, 1, 2))
    counters.add(counts(1, selected=1), new_window=True)
    reading = counters.read()
    counters.add(counts(1, selected=1), new_window=True)
    assert reading.total.layers.max() == reading.window.selections[0, 0] == 1


def test_an_idle_engine_is_out_of_date_beside_one_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(engine_counters.time, "monotonic", lambda: now[0])
    idle, busy = (EngineCounters(Counts.zeros(LAYERS)) for _ in range(2))
    idle.add(counts(1), new_window=True)
    now[0] += 2 * WINDOW_SECONDS - 1
    busy.add(counts(1), new_window=True)
    assert len(at_work([idle.read(), busy.read()])) == 2
    now[0] += 2
    busy.add(counts(1), new_window=True)
    (left,) = at_work([idle.read(), busy.read()])
    assert left.total.exits[0] == 2
    assert at_work([]) == []
