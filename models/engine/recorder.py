"""Notes what steps ran, for the scheduler to add up (`sluice.models.telemetry.ledger`).

All of it is what a step's plan already knows on the host, so that counting never waits for the
device. What the routers did is counted on the device, and read with the step's output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sluice.models.depth.masks import MaskTable, Segment
from sluice.models.depth.registry import exit_method
from sluice.models.engine.request_state import RequestState
from sluice.models.engine.step import RoutedStep, StepOutcome, StepRequests
from sluice.models.experts.router import ExpertRouter
from sluice.models.experts.routing_counts import Selections
from sluice.models.policy.axes import DECODE, PHASES, PREFILL, BoolArray, IntArray
from sluice.models.telemetry.ledger import FLUSH_SECONDS
from sluice.models.telemetry.request_sums import ExpertSums
from sluice.models.telemetry.step_counts import (
    RequestStep,
    RoutedStepCounts,
    StockStep,
    WorkerCounts,
)


@dataclass(frozen=True, slots=True, eq=False)
class SentCounts:
    """What a worker will tell with an output, once the device's part of it has arrived.

    Attributes:
        steps: as in `WorkerCounts`; with the step, where its routers counted.
        selections: as in `WorkerCounts`.
    """

    steps: tuple[tuple[StockStep | RoutedStepCounts, RoutedStep | None], ...]
    selections: Selections | None

    def read(self) -> WorkerCounts:
        """Wait for the device; in any thread, and once."""
        steps: list[StockStep | RoutedStepCounts] = []
        total = None if self.selections is None else self.selections.read()
        for counts, step in self.steps:
            if step is None or isinstance(counts, StockStep):
                steps.append(counts)
                continue
            counts, selected = _with_experts(counts, step)
            steps.append(counts)
            total = selected if total is None else total + selected
        return WorkerCounts(tuple(steps), total if total is not None and total.any() else None)


class Recorder:
    """Notes the steps of one engine."""

    def __init__(self, table: MaskTable | None = None, router: ExpertRouter | None = None) -> None:
        """Start without steps.

        Args:
            table: masks that the segments of a step name; None where nothing is routed.
            router: counts the selections of experts, if the model has any.
        """
        self._table = table
        self._router = router
        self._steps: list[tuple[StockStep | RoutedStepCounts, RoutedStep | None]] = []
        self._said_masks: dict[int, int] = {}
        self._said_skipped: set[str] = set()
        self._selections_said = 0.0
        self._alone = False

    def note_stock(self, requests: StepRequests) -> None:
        """Note a step that ran everything."""
        self._alone = len(requests.ids) == 1
        self._steps.append((StockStep(int(requests.scheduled.sum()), requests.generated), None))

    def note(self, step: RoutedStep, outcome: StepOutcome, *, routed_experts: bool = False) -> None:
        """Note what became of a step's tokens.

        Args:
            step: that has run.
            outcome: what it decided.
            routed_experts: its routers counted.
        """
        self._alone = len(step.requests.ids) == 1
        counts = RoutedStepCounts(
            segments=np.array(outcome.segments, dtype=np.int64).reshape(-1, len(Segment._fields)),
            passes=step.passes,
            masks=self._new_masks(outcome.segments),
            requests=tuple(self._requests(step, outcome)),
        )
        self._steps.append((counts, step if routed_experts else None))

    def forget(self, request_id: str) -> None:
        """Forget an ended request."""
        self._said_skipped.discard(request_id)

    def take(self, *, idle: bool) -> SentCounts | None:
        """What there is to tell with an output; None for nothing.

        Args:
            idle: the engine has nothing to run, and may have nothing for long.
        """
        selections, now = None, time.monotonic()
        # What a request selects that runs alone is its own: it is there with the answer.
        due = idle or self._alone or now - self._selections_said >= FLUSH_SECONDS
        if self._router is not None and due:
            self._selections_said = now
            selections = self._router.send_selections()
        if not self._steps and selections is None:
            return None
        steps, self._steps = tuple(self._steps), []
        return SentCounts(steps, selections)

    def _new_masks(
        self, segments: Sequence[Segment]
    ) -> Mapping[int, tuple[np.ndarray, np.ndarray]]:
        assert self._table is not None
        said, masks = self._said_masks, {}
        for row in {segment.mask for segment in segments}:
            version = self._table.versions[row]
            if said.get(row) != version:
                said[row] = version
                masks[row] = self._table.skip[row].copy(), self._table.fill[row].copy()
        return masks

    def _requests(self, step: RoutedStep, outcome: StepOutcome) -> list[RequestStep]:
        """What each routed request adds to its sums."""
        reports = any(state.extra.policy.report for state in step.states.values())
        last_masks: dict[int, int] = {}
        if reports:
            last_masks = {each.request: each.mask for each in outcome.segments if not each.pending}
        notes = []
        for index, state in step.states.items():
            left_after = outcome.exit_layers.get(index)
            sampled, heads = _heads(step, index, left_after if index in outcome.tested else None)
            notes.append(
                RequestStep(
                    request_id=step.requests.ids[index],
                    index=index,
                    sampled=sampled,
                    heads=heads,
                    exit_layer=None if left_after is None else int(left_after),
                    token=self._token(step, index, state, last_masks) if reports else None,
                    skipped=self._skipped(step.requests.ids[index], state),
                )
            )
        return notes

    def _token(
        self, step: RoutedStep, index: int, state: RequestState, last_masks: Mapping[int, int]
    ) -> tuple[int, int] | None:
        """Index of the step's generated token, and the last layer that ran for it."""
        assert self._table is not None
        token = step.last_position(index) + 1 - state.prompt_tokens
        if not state.extra.policy.report or token < 0:
            return None
        ran = np.flatnonzero(~self._table.skip[last_masks[index]].all(axis=1))
        return token, int(ran[-1]) if len(ran) else 0

    def _skipped(self, request_id: str, state: RequestState) -> BoolArray | None:
        if not state.decided or request_id in self._said_skipped:
            return None
        self._said_skipped.add(request_id)
        return state.decided_skip


def _heads(step: RoutedStep, index: int, left_after: int | None) -> tuple[int | None, int]:
    """Phase in which a request's token is sampled, if any, and rows that the LM head ran on.

    A test that asks for logits runs it; where a token leaves, its last test's are what is sampled
    from. A contrast runs it once more, for the weak pass.

    Args:
        step: that has run.
        index: of the request in the batch.
        left_after: layer after which its new token left under an exit rule; None if it was not
            tested.
    """
    requests, policy = step.requests, step.states[index].extra.policy
    end, prompt = requests.computed[index] + requests.scheduled[index], requests.prompt[index]
    if end < prompt:
        return None, 0
    ran = 1 + (step.weak is not None and index in step.weak.owners)
    rule = policy.exit
    if rule is not None and left_after is not None and exit_method(rule.method).needs_logits:
        tests = sum(layer <= left_after for layer in rule.layers)
        ran += tests - (left_after in rule.layers)
    return (DECODE if end > prompt else PREFILL), ran


def _with_experts(counts: RoutedStepCounts, step: RoutedStep) -> tuple[RoutedStepCounts, IntArray]:
    """Counts of a step with what its routers did, and their selections."""
    assert step.experts is not None
    sums = step.experts.counts.read()
    ran = sum_by_request(sums.ran, step.segments, step.passes)
    weak = np.zeros((len(step.requests.ids), len(PHASES)), dtype=np.int64)
    for segment in step.segments:
        if segment.weak:
            weak[step.owner(segment.request), segment.phase] += segment.length
    requests = []
    for request in counts.requests:
        policy = step.states[request.index].extra.policy.experts
        if not policy.empty:
            experts = ExpertSums(
                policy.budget is not None,
                ran[request.index],
                sums.loaded,
                sums.layers,
                weak[request.index],
            )
            request = replace(request, experts=experts)
        requests.append(request)
    return replace(counts, requests=tuple(requests)), sums.selections


def sum_by_request(ran: IntArray, segments: Sequence[Segment], requests: int) -> IntArray:
    """What the tokens of each request ran, int64, (requests, 2 phases, 3).

    Args:
        ran: of each token, (tokens, 3), columns as in `sluice.kernels.ops.router_config`.
        segments: of the step.
        requests: in it, weak passes among them.
    """
    groups = [segment.request * len(PHASES) + segment.phase for segment in segments]
    tokens = np.repeat(groups, [segment.length for segment in segments])
    sums = np.zeros((requests * len(PHASES), ran.shape[1]), dtype=np.int64)
    np.add.at(sums, tokens, ran)
    return sums.reshape(requests, len(PHASES), -1)
