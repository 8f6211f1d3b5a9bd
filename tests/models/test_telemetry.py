"""Counters across processes' mappings, the window, records, and the compute fraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.models import telemetry
from sluice.models.plan import EXECUTED, FILLED, SKIPPED
from sluice.models.telemetry import (
    LayerCounters,
    ModuleCost,
    RequestRecords,
    full_depth_counts,
)

LAYERS = 3


def test_a_reader_sees_what_the_writer_adds(tmp_path: Path) -> None:
    path = tmp_path / "engine-0.counts"
    writer = LayerCounters.create(path, LAYERS)
    reader = LayerCounters.read(path)
    assert reader.totals.sum() == 0
    writer.add(full_depth_counts(LAYERS) * 5)
    assert reader.totals[..., EXECUTED].tolist() == [[5, 5]] * LAYERS
    assert reader.window.sum() == reader.totals.sum()


def test_the_window_forgets_and_the_total_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0, 5.0, 11.0, 12.0, 25.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock.pop(0))
    counters = LayerCounters.in_memory(LAYERS)
    step = full_depth_counts(LAYERS)
    for _ in range(4):
        counters.add(step)
    assert counters.window[0, 0, EXECUTED] == 4
    counters.add(step)
    assert counters.window[0, 0, EXECUTED] == 3
    assert counters.totals[0, 0, EXECUTED] == 5


def test_records_sum_and_are_taken_once() -> None:
    records = RequestRecords(LAYERS)
    records.add("a", full_depth_counts(LAYERS))
    records.add("a", full_depth_counts(LAYERS) * 2)
    taken = records.take("a")
    assert taken is not None
    assert taken[..., EXECUTED].tolist() == [[3, 3]] * LAYERS
    assert records.take("a") is None


def test_records_of_vanished_clients_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_MAX_RECORDS", 3)
    records = RequestRecords(LAYERS)
    for key in "abcde":
        records.add(key, full_depth_counts(LAYERS))
    assert [records.take(key) is not None for key in "abcde"] == [False, False, True, True, True]


def test_compute_fraction_weighs_modules_by_their_parameters() -> None:
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    counts = full_depth_counts(LAYERS) * 10
    assert cost.fraction(counts) == 1.0
    counts[0, 1, EXECUTED], counts[0, 1, SKIPPED] = 0, 10
    assert cost.fraction(counts) == pytest.approx(9 / 12)
    counts[1, 0, EXECUTED], counts[1, 0, FILLED] = 0, 10
    assert cost.fraction(counts) == pytest.approx(8.5 / 12)
    assert cost.fraction(np.zeros_like(counts)) == 1.0
