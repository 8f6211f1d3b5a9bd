"""Counters across processes' mappings, the window, records, and the compute fraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.models.policy.axes import EXECUTED, FILLED, SKIPPED
from sluice.models.telemetry import layer_counters as telemetry
from sluice.models.telemetry.layer_counters import LayerCounters
from sluice.models.telemetry.request_record import ModuleCost, RequestRecords

LAYERS = 3


def test_a_reader_sees_what_the_writer_adds(tmp_path: Path) -> None:
    path = tmp_path / "engine-0.counts"
    writer = LayerCounters.create(path, LAYERS)
    reader = LayerCounters.read(path)
    assert reader.totals.sum() == 0
    writer.add_full_depth(rows=5, generated=2)
    assert reader.totals[..., EXECUTED].tolist() == [[5, 5]] * LAYERS
    assert reader.totals.sum() == 5 * 2 * LAYERS
    assert reader.window.sum() == reader.totals.sum()
    assert reader.exits.tolist() == [0, 0, 2]
    counts = np.zeros((LAYERS, 2, 3), dtype=np.int64)
    counts[1, 0, FILLED] = 7
    writer.add(counts, np.array([7, 0, 0]))
    assert reader.totals[1, 0].tolist() == [5, 0, 7]
    assert reader.exits.tolist() == [7, 0, 2]


def test_the_window_forgets_and_the_total_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0, 5.0, 11.0, 12.0, 25.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock.pop(0))
    counters = LayerCounters.in_memory(LAYERS)
    for _ in range(4):
        counters.add_full_depth(1, 1)
    assert counters.window[0, 0, EXECUTED] == 4
    counters.add_full_depth(1, 1)
    assert counters.window[0, 0, EXECUTED] == 3
    assert counters.totals[0, 0, EXECUTED] == 5
    assert counters.exits.tolist() == [0, 0, 5]


def test_records_are_taken_once() -> None:
    records = RequestRecords(LAYERS)
    records.of("a").exits += 1
    records.of("a").exits += 2
    taken = records.take("a")
    assert taken is not None
    assert taken.exits.tolist() == [3] * LAYERS
    assert taken.counts.shape == (2, LAYERS, 2, 3)
    assert records.take("a") is None


def test_records_of_vanished_clients_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_MAX_RECORDS", 3)
    records = RequestRecords(LAYERS)
    for key in "abcde":
        records.of(key)
    assert [records.take(key) is not None for key in "abcde"] == [False, False, True, True, True]


def full_depth(rows: int) -> np.ndarray:
    counts = np.zeros((LAYERS, 2, 3), dtype=np.int64)
    counts[..., EXECUTED] = rows
    return counts


def test_compute_fraction_weighs_modules_by_their_parameters() -> None:
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    counts = full_depth(10)
    assert cost.fraction(counts) == 1.0
    counts[0, 1, EXECUTED], counts[0, 1, SKIPPED] = 0, 10
    assert cost.fraction(counts) == pytest.approx(9 / 12)
    counts[1, 0, EXECUTED], counts[1, 0, FILLED] = 0, 10
    assert cost.fraction(counts) == pytest.approx(8.5 / 12)
    assert cost.fraction(np.zeros_like(counts)) == 1.0


def test_rows_that_run_on_later_do_not_stretch_the_fraction() -> None:
    """A pending row left after layer 0 and ran layers 1 and 2 with a later token."""
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    counts = full_depth(2)
    counts[1:, :, SKIPPED] = 1
    assert cost.fraction(counts) == 1.0
