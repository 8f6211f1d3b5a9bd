"""What a worker tells of its steps: what the scheduler does not know yet, and nothing twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sluice.models.depth.masks import DepthMask, MaskTable, Segment
from sluice.models.engine import recorder as module
from sluice.models.engine.recorder import Recorder
from sluice.models.engine.step import StepOutcome, StepRequests
from sluice.models.policy.axes import DECODE, EXECUTED, PREFILL, SKIPPED
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.telemetry.ledger import FLUSH_SECONDS, Ledger
from sluice.models.telemetry.step_counts import RoutedStepCounts, StockStep

LAYERS = 3
SHALLOW = DepthMask.full(LAYERS).leaving_after(0, fill=False)
DEEPER = DepthMask.full(LAYERS).leaving_after(1, fill=False)


def requests(ids: list[str], computed: int, scheduled: int, prompt: int = 4) -> StepRequests:
    every = np.ones(len(ids), dtype=np.int64)
    return StepRequests(ids, every * scheduled, every * computed, every * prompt)


def step(batch: StepRequests, *, decided: bool = False) -> Any:
    """A step whose first request is routed."""
    state = SimpleNamespace(
        extra=SimpleNamespace(policy=RoutingPolicy(report=True)),
        prompt_tokens=int(batch.prompt[0]),
        decided=decided,
        decided_skip=SHALLOW.skip if decided else None,
    )
    last = int(batch.computed[0] + batch.scheduled[0]) - 1
    return SimpleNamespace(
        requests=batch,
        passes=len(batch.ids),
        states={0: state},
        weak=None,
        last_position=lambda index: last,
    )


def told(recorder: Recorder) -> tuple[StockStep | RoutedStepCounts, ...]:
    sent = recorder.take(idle=False)
    assert sent is not None
    return sent.read().steps


def test_steps_without_routing_are_two_numbers() -> None:
    recorder = Recorder()
    recorder.note_stock(requests(["a", "b"], computed=0, scheduled=4))
    recorder.note_stock(requests(["a", "b"], computed=4, scheduled=1))
    assert told(recorder) == (StockStep(8, 0), StockStep(2, 2))
    assert recorder.take(idle=False) is None


def test_masks_are_told_once_and_again_when_a_row_gets_another() -> None:
    table = MaskTable(LAYERS)
    recorder, ledger = Recorder(table), Ledger(LAYERS)
    row = table.acquire(SHALLOW)

    def run(mask: int, computed: int) -> RoutedStepCounts:
        batch = requests(["a", "b"], computed, scheduled=1)
        segments = [Segment(0, DECODE, mask, 1), Segment(1, DECODE, 0, 1)]
        recorder.note(step(batch), StepOutcome(segments, {}, frozenset()))
        sent = recorder.take(idle=False)
        assert sent is not None
        ledger.add(sent.read(), lambda _: True)
        (counts,) = sent.read().steps
        assert isinstance(counts, RoutedStepCounts)
        return counts

    assert run(row, computed=4).masks.keys() == {0, row}
    assert run(row, computed=5).masks == {}
    table.release(row)
    assert table.acquire(DEEPER) == row
    assert run(row, computed=6).masks.keys() == {row}
    sums = ledger.take("a")
    assert sums is not None
    assert sums.counts[DECODE, :, 0, EXECUTED].tolist() == [3, 1, 0]
    assert sums.counts[DECODE, :, 0, SKIPPED].tolist() == [0, 2, 3]
    assert sums.exits.tolist() == [2, 1, 0]
    assert sums.token_layers == [], "these tokens of the answer come out of order"


def test_what_a_request_adds_beside_its_segments() -> None:
    table = MaskTable(LAYERS)
    recorder = Recorder(table)
    shallow = table.acquire(SHALLOW)
    for number, (computed, scheduled, mask) in enumerate(((0, 3, 0), (3, 1, 0), (4, 1, shallow))):
        phase = DECODE if computed >= 4 else PREFILL
        batch = requests(["a"], computed, scheduled)
        outcome = StepOutcome(
            [Segment(0, phase, mask, scheduled)], {0: 0} if number == 2 else {}, frozenset()
        )
        recorder.note(step(batch, decided=number > 0), outcome)
    notes = [each.requests[0] for each in told(recorder) if isinstance(each, RoutedStepCounts)]
    assert [(note.request_id, note.sampled, note.heads) for note in notes] == [
        ("a", None, 0),
        ("a", PREFILL, 1),
        ("a", DECODE, 1),
    ]
    assert [note.exit_layer for note in notes] == [None, None, 0]
    assert [note.token for note in notes] == [None, (0, LAYERS - 1), (1, 0)]
    assert [note.skipped is not None for note in notes] == [False, True, False], "once"


class FakeRouter:
    """Has always selected something."""

    def __init__(self) -> None:
        self.sent = 0

    def send_selections(self) -> Any:
        self.sent += 1
        return SimpleNamespace(read=lambda: np.ones((1, 4), dtype=np.int64))


def test_selections_wait_unless_a_request_runs_alone_or_nothing_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    router = FakeRouter()
    recorder = Recorder(MaskTable(LAYERS), router)  # type: ignore[arg-type]
    pair, alone = requests(["a", "b"], 4, 1), requests(["a"], 4, 1)

    def sends(batch: StepRequests | None, *, idle: bool = False) -> bool:
        before = router.sent
        if batch is not None:
            recorder.note_stock(batch)
        recorder.take(idle=idle)
        return router.sent > before

    assert [sends(batch) for batch in (pair, pair, alone, pair)] == [True, False, True, False]
    assert sends(None, idle=True)
    now[0] += FLUSH_SECONDS
    assert sends(pair)
