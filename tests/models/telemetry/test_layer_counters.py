"""Counters across processes' mappings, the window, records, and the compute fraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sluice.models.policy.axes import EXECUTED, FILLED
from sluice.models.telemetry import counter_file
from sluice.models.telemetry.layer_counters import LayerCounters

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
    monkeypatch.setattr(counter_file.time, "monotonic", lambda: clock.pop(0))
    counters = LayerCounters.create(None, LAYERS)
    for _ in range(4):
        counters.add_full_depth(1, 1)
    assert counters.window[0, 0, EXECUTED] == 4
    counters.add_full_depth(1, 1)
    assert counters.window[0, 0, EXECUTED] == 3
    assert counters.totals[0, 0, EXECUTED] == 5
    assert counters.exits.tolist() == [0, 0, 5]
