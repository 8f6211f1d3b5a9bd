"""Counts what steps ran: for the counter files, and for the record of each request.

All of it is integers that a step's plan already knows, so that counting never waits for the
device. What the routers did is counted on the device, and read once it has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sluice.models.depth.masks import MaskTable, Segment
from sluice.models.depth.registry import exit_method
from sluice.models.engine.step import RoutedStep, StepOutcome
from sluice.models.experts.router import ExpertRouter
from sluice.models.policy.axes import (
    ATTENTION,
    DECODE,
    EXECUTED,
    FILLED,
    MODULES,
    OUTCOMES,
    PHASES,
    PREFILL,
    SKIPPED,
    BoolArray,
    IntArray,
)
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.telemetry.layer_counters import LayerCounters
from sluice.models.telemetry.request_record import (
    ExpertSums,
    ModuleCost,
    RequestSumsByKey,
    RoutingRecord,
)


class Recorder:
    """Counts the steps of one engine that have routed requests."""

    def __init__(
        self,
        counters: LayerCounters,
        table: MaskTable,
        cost: ModuleCost,
        router: ExpertRouter | None,
        shape: ExpertShape | None,
    ) -> None:
        """Count into `counters` and into records.

        Args:
            counters: of the engine's layers.
            table: masks that the segments of a step name.
            cost: of the model's layers.
            router: counts the selections of experts, if the model has any.
            shape: of these experts.
        """
        self._counters = counters
        self._table = table
        self._cost = cost
        self._router = router
        self._shape = shape
        self._requests = RequestSumsByKey(len(cost.modules))
        self._uncounted: RoutedStep | None = None

    def count(self, step: RoutedStep, outcome: StepOutcome) -> None:
        """Count what became of a step's tokens."""
        segments, table = outcome.segments, self._table
        counts, exits = count_outcomes(segments, step.passes, table.skip, table.fill)
        self._counters.add(counts.sum(axis=(0, 1)), exits.sum(axis=0))
        for index, state in step.states.items():
            sums = self._requests.get(state.extra.request_key)
            sums.counts += counts[index]
            sums.exits += exits[index]
            left_after = outcome.exit_layers[index] if index in outcome.tested else None
            _count_heads(sums.heads, step, index, left_after)
            sums.skipped = state.decided_skip
            if index in outcome.exit_layers:
                sums.exit_layers.append(outcome.exit_layers[index])
        if any(state.extra.policy.report for state in step.states.values()):
            self._note_layers(step, outcome)

    def _note_layers(self, step: RoutedStep, outcome: StepOutcome) -> None:
        """Note the last layer of each generated token whose request asked for a report."""
        last_masks = {each.request: each.mask for each in outcome.segments if not each.pending}
        for index, state in step.states.items():
            token = step.last_position(index) + 1 - state.prompt_tokens
            if state.extra.policy.report and token >= 0:
                ran = np.flatnonzero(~self._table.skip[last_masks[index]].all(axis=1))
                layer = int(ran[-1]) if len(ran) else 0
                sums = self._requests.get(state.extra.request_key)
                sums.add_token(step.requests.ids[index], token, layer)

    def count_experts_later(self, step: RoutedStep) -> None:
        """Have the next `count_experts` count a step whose routers have just run."""
        self._uncounted = step

    def count_experts(self) -> None:
        """Count what the routers did in the latest step, if that is still to do."""
        step, self._uncounted = self._uncounted, None
        if step is None or step.experts is None or self._router is None:
            return
        step_sums = self._router.sums(step.experts)
        ran = sum_by_request(step_sums.ran, step.segments, step.passes)
        weak = np.zeros((len(step.requests.ids), len(PHASES)), dtype=np.int64)
        for segment in step.segments:
            if segment.weak:
                weak[step.owner(segment.request), segment.phase] += segment.length
        for index, state in step.states.items():
            policy = state.extra.policy.experts
            if policy.empty:
                continue
            sums = self._requests.get(state.extra.request_key)
            if sums.experts is None:
                sums.experts = ExpertSums(policy.budget is not None)
            sums.experts.ran += ran[index]
            sums.experts.loaded += step_sums.loaded
            sums.experts.layers += step_sums.layers
            sums.experts.weak += weak[index]

    def take(self, request_key: str) -> RoutingRecord | None:
        """Hand out the record of an ended request; None if it never reached a step."""
        self.count_experts()
        sums = self._requests.take(request_key)
        return None if sums is None else sums.record(self._cost, self._shape)


def _count_heads(heads: IntArray, step: RoutedStep, index: int, left_after: int | None) -> None:
    """Add the rows of a request that the LM head ran on in a step.

    A test that asks for logits runs it; where a token leaves, its last test's are what is sampled
    from. A contrast runs it once more, for the weak pass.

    Args:
        heads: as in `RequestSums`.
        step: that has run.
        index: of the request in the batch.
        left_after: layer after which its new token left under an exit rule; None if it was not
            tested.
    """
    requests, policy = step.requests, step.states[index].extra.policy
    end, prompt = requests.computed[index] + requests.scheduled[index], requests.prompt[index]
    if end < prompt:
        return
    ran = 1 + (step.weak is not None and index in step.weak.owners)
    rule = policy.exit
    if rule is not None and left_after is not None and exit_method(rule.method).needs_logits:
        tests = sum(layer <= left_after for layer in rule.layers)
        ran += tests - (left_after in rule.layers)
    heads[DECODE if end > prompt else PREFILL] += 1, ran


def count_outcomes(
    segments: Sequence[Segment], requests: int, skip: BoolArray, fill: BoolArray
) -> tuple[IntArray, IntArray]:
    """What became of the tokens; arguments as in `build_plan`.

    Returns:
        outcomes: int64, (requests, 2 phases, layers, 2 modules, 3 outcomes), token rows.
        exits: int64, (requests, layers), generated rows by the last layer they ran anything in;
            a row that ran nothing at all counts for the first.
    """
    layers = skip.shape[1]
    # One pass over all segments: a step has as many as a batch has requests, and it waits for this.
    columns = np.array(segments, dtype=np.int64).reshape(-1, len(Segment._fields)).T
    owners, phases, masks, lengths, pending, weak = columns
    skipped, fresh = skip[masks], pending == 0
    filled = fill[masks] & fresh[:, np.newaxis]
    each = np.zeros((len(owners), layers, len(MODULES), len(OUTCOMES)), np.int64)
    each[..., EXECUTED] = ~skipped
    # Lower layers of a pending row, and that it left, were counted when it ran them.
    each[..., SKIPPED] = skipped & fresh[:, np.newaxis, np.newaxis]
    each[:, :, ATTENTION, SKIPPED] -= filled
    each[:, :, ATTENTION, FILLED] = filled
    each *= lengths[:, np.newaxis, np.newaxis, np.newaxis]
    outcomes = np.zeros((requests, len(PHASES), *each.shape[1:]), np.int64)
    np.add.at(outcomes, (owners, phases), each)
    ran: BoolArray = np.any(~skipped, axis=2)
    last = np.where(ran.any(axis=1), layers - 1 - ran[:, ::-1].argmax(axis=1), 0)
    generated = fresh & (phases == DECODE) & (weak == 0)
    exits = np.zeros((requests, layers), np.int64)
    np.add.at(exits, (owners, last), lengths * generated)
    return outcomes, exits


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
