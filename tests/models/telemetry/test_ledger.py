"""What a scheduler adds up of what its workers tell."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.kernels.ops.router_config import ROUTED
from sluice.models.policy.axes import DECODE, EXECUTED, PREFILL, SKIPPED
from sluice.models.telemetry import ledger as module
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.ledger import FLUSH_SECONDS, WINDOW_SECONDS, Ledger
from sluice.models.telemetry.request_sums import ExpertSums
from sluice.models.telemetry.step_counts import (
    RequestStep,
    RoutedStepCounts,
    StockStep,
    WorkerCounts,
)

LAYERS = 3
FULL = (np.zeros((LAYERS, 2), dtype=np.bool_), np.zeros(LAYERS, dtype=np.bool_))
SHALLOW = (np.array([[False] * 2, [True] * 2, [True] * 2]), np.zeros(LAYERS, dtype=np.bool_))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def routed(request_id: str, *, shallow: bool, masks: bool = False) -> WorkerCounts:
    """A step in which a routed request reads two tokens, and its neighbour without routing one."""
    return WorkerCounts(
        (
            RoutedStepCounts(
                segments=np.array(
                    [[0, PREFILL, 5 if shallow else 0, 2, 0, 0], [1, DECODE, 0, 1, 0, 0]]
                ),
                passes=2,
                masks={0: FULL, 5: SHALLOW} if masks else {},
                requests=(RequestStep(request_id, 0, sampled=PREFILL, heads=3, exit_layer=1),),
            ),
        )
    )


def added(ledger: Ledger) -> Counts:
    flush = ledger.flush(idle=True)
    assert flush is not None
    return flush.counts


def test_steps_add_up() -> None:
    ledger = Ledger(LAYERS)
    ledger.add(WorkerCounts((StockStep(rows=5, generated=2), StockStep(1, 1))), lambda _: True)
    counts = added(ledger)
    assert counts.layers[..., EXECUTED].tolist() == [[6, 6]] * LAYERS
    assert counts.layers.sum() == 6 * 2 * LAYERS
    assert counts.exits.tolist() == [0, 0, 3]
    assert len(counts.selections) == 0
    assert ledger.flush(idle=True) is None


def test_masks_are_said_once() -> None:
    ledger = Ledger(LAYERS)
    ledger.add(routed("a", shallow=True, masks=True), lambda _: True)
    ledger.add(routed("a", shallow=True), lambda _: True)
    counts = added(ledger)
    assert counts.layers[:, 0, EXECUTED].tolist() == [6, 2, 2]
    assert counts.layers[:, 0, SKIPPED].tolist() == [0, 4, 4]
    assert counts.exits.tolist() == [0, 0, 2]
    sums = ledger.take("a")
    assert sums is not None
    assert sums.counts[PREFILL, :, 0, EXECUTED].tolist() == [4, 0, 0]
    assert sums.heads[PREFILL].tolist() == [2, 6]
    assert sums.exit_layers == [1, 1]
    assert ledger.take("a") is None
    assert ledger.take("nobody") is None


def test_a_row_gets_another_mask() -> None:
    ledger = Ledger(LAYERS)
    ledger.add(routed("a", shallow=True, masks=True), lambda _: True)
    again = routed("a", shallow=True)
    step = again.steps[0]
    assert isinstance(step, RoutedStepCounts)
    changed = RoutedStepCounts(step.segments, step.passes, {5: FULL}, step.requests)
    ledger.add(WorkerCounts((changed,)), lambda _: True)
    assert added(ledger).layers[2, 0, EXECUTED] == 1 + 3


def test_what_runs_on_for_ended_requests_is_counted_and_belongs_to_nobody() -> None:
    ledger = Ledger(LAYERS)
    ledger.add(routed("ended", shallow=False, masks=True), lambda _: False)
    assert added(ledger).layers[0, 0, EXECUTED] == 3
    assert ledger.take("ended") is None


def test_experts_add_up() -> None:
    ledger = Ledger(LAYERS)
    experts = ExpertSums(neighbour_dependent=True, loaded=3, layers=2)
    experts.ran[DECODE, ROUTED] = 4
    step = routed("a", shallow=False, masks=True).steps[0]
    assert isinstance(step, RoutedStepCounts)
    told = RoutedStepCounts(
        step.segments, step.passes, step.masks, (RequestStep("a", 0, experts=experts),)
    )
    for selections in (None, np.array([[1, 2, 3, 4]]), np.array([[1, 0, 0, 0]])):
        ledger.add(WorkerCounts((told,), selections), lambda _: True)
    counts = added(ledger)
    assert counts.by_expert.tolist() == [[2, 2]]
    assert (counts.routed_rows.tolist(), counts.masked.tolist()) == ([3], [4])
    sums = ledger.take("a")
    assert sums is not None
    assert sums.experts is not None
    assert (sums.experts.loaded, sums.experts.layers) == (9, 6)
    assert sums.experts.ran[DECODE, ROUTED] == 12
    assert experts.loaded == 3


def test_counts_wait_while_there_is_work(clock: list[float]) -> None:
    ledger, step = Ledger(LAYERS), WorkerCounts((StockStep(1, 1),))
    rows = []
    for _ in range(9):
        ledger.add(step, lambda _: True)
        flush = ledger.flush(idle=False)
        rows.append(0 if flush is None else int(flush.counts.exits[-1]))
        clock[0] += FLUSH_SECONDS / 4
    assert rows == [1, 0, 0, 0, 4, 0, 0, 0, 4]
    ledger.add(step, lambda _: True)
    assert ledger.flush(idle=False) is None
    assert added(ledger).exits[-1] == 1


def test_windows_are_of_work(clock: list[float]) -> None:
    ledger = Ledger(LAYERS)
    begins = []
    for seconds in (0.0, WINDOW_SECONDS / 2, WINDOW_SECONDS / 2, 1.0, 10 * WINDOW_SECONDS):
        clock[0] += seconds
        assert ledger.flush(idle=True) is None
        ledger.add(WorkerCounts((StockStep(1, 1),)), lambda _: True)
        flush = ledger.flush(idle=True)
        assert flush is not None
        begins.append(flush.new_window)
    assert begins == [True, False, True, False, True]
