"""The routed requests of an engine, and the plan of each step that has some of them.

A step begins with `Batch.step`: the requests' masks become segments, the segments a plan, and
`ObserverFactory` makes the observers that decide while the layers run. It ends with `Batch.commit`,
which stores what they decided in the requests' states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sluice.models.depth.masks import FULL_DEPTH, MaskTable, Segment
from sluice.models.depth.method import PromptTokenMethod
from sluice.models.depth.recompute import PendingToken
from sluice.models.depth.registry import adaptive_method
from sluice.models.engine.observer_factory import ObserverFactory
from sluice.models.engine.observers import StepDecisions
from sluice.models.engine.plan import LayerPlanner, StepPlan, build_plan
from sluice.models.engine.request_state import RequestState
from sluice.models.engine.step import RoutedStep, StepOutcome, StepRequests
from sluice.models.experts.batch import BatchExperts
from sluice.models.experts.contrast import BlockIds, WeakPasses
from sluice.models.experts.remix import prompt_embedding
from sluice.models.experts.selection import StepExperts
from sluice.models.policy.axes import DECODE, PREFILL, FloatArray, IntArray
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.profile.profile import Profile

_MAX_CACHED_PLANS = 16
_EMBEDDED_AT_ONCE = 4096


class Batch:
    """States of the routed requests, by vLLM's request id."""

    def __init__(
        self,
        num_layers: int,
        block_size: int,
        profile: Profile | None,
        device: torch.device,
        plan_layers: LayerPlanner,
        experts: BatchExperts | None,
        worth: FloatArray,
    ) -> None:
        """Start without requests.

        Args:
            num_layers: of the model.
            block_size: tokens of a K/V block.
            profile: of the model, or None.
            device: that it runs on.
            plan_layers: chooses how layers are run.
            experts: expert controls, or None if it has no routed experts.
            worth: of leaving after each layer, in LM heads, (layers,).
        """
        self.plan_layers = plan_layers
        self.experts = experts
        self.table = MaskTable(num_layers)
        self._num_layers = num_layers
        self._device = device
        self._worth = worth
        self._observers = ObserverFactory(num_layers, block_size, profile, device)
        self._states: dict[str, RequestState] = {}
        self._plans: dict[tuple[Segment, ...], StepPlan] = {}

    def __len__(self) -> int:
        return len(self._states)

    def add(
        self,
        request_id: str,
        extra: RoutingExtraArgs,
        prompt: Sequence[int],
        max_tokens: int,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add a request that is about to start.

        Args:
            request_id: vLLM's.
            extra: its policy and the key of its record.
            prompt: token ids.
            max_tokens: longest output the client allowed.
            embed: from token ids, (n,), to embeddings, (n, hidden).
        """
        state = RequestState(extra, len(prompt), max_tokens, self.table, self._worth)

        def embedded() -> torch.Tensor:
            ids = torch.tensor(prompt, device=self._device)
            return torch.cat([embed(part) for part in torch.split(ids, _EMBEDDED_AT_ONCE)])

        rule = extra.policy.adaptive
        method = None if rule is None else adaptive_method(rule)
        if rule is not None and isinstance(method, PromptTokenMethod):
            state.keep_prompt_tokens(method.kept_tokens(embedded(), rule, self._num_layers))
        experts = extra.policy.experts
        if self.experts is not None and not experts.empty:
            self.experts.add(request_id, experts, len(prompt), lambda: prompt_embedding(embedded()))
        self._states[request_id] = state

    def resume(self, request_id: str, generated: int) -> bool:
        """Go on with a request that was preempted, and has so many generated tokens.

        Returns:
            Whether it is here.
        """
        state = self._states.get(request_id)
        if state is not None:
            state.resume(generated)
        return state is not None

    def remove(self, request_id: str) -> None:
        """Forget an ended request."""
        if self.experts is not None:
            self.experts.remove(request_id)
        state = self._states.pop(request_id, None)
        if state is not None and state.release():
            # The row may come back with another mask, and plans are keyed by row.
            self._plans.clear()

    def step(
        self, requests: StepRequests, weak_blocks: Mapping[str, BlockIds] | None = None
    ) -> RoutedStep:
        """Plan a step.

        Args:
            requests: in it.
            weak_blocks: K/V blocks of the weak passes of contrasts, by request id.
        """
        all_states = [self._states.get(request_id) for request_id in requests.ids]
        states = {index: state for index, state in enumerate(all_states) if state is not None}
        self._agree(requests, states)
        segments: list[Segment] = []
        waiting: list[PendingToken] = []
        first_rows = np.zeros(len(all_states), dtype=np.int64)
        end = 0
        for index, state in enumerate(all_states):
            computed, scheduled = int(requests.computed[index]), int(requests.scheduled[index])
            if state is None:
                added = _stock_segments(index, computed, scheduled, int(requests.prompt[index]))
            else:
                added = list(state.segments(index, computed, scheduled))
                if state.pending is not None and added[-1].phase == DECODE:
                    waiting += state.pending.tokens
            segments += added
            end += sum(segment.length for segment in added)
            first_rows[index] = end - scheduled
        weak = self._weak_passes(requests, weak_blocks or {}, first_rows, end)
        owners = np.arange(len(all_states))
        if weak is not None:
            segments += weak.segments(segments, len(all_states))
            owners = np.append(owners, weak.owners)
        step = RoutedStep(
            requests=requests,
            segments=segments,
            plan=self._plan(tuple(segments), len(owners)),
            first_rows=first_rows,
            states=states,
            pending=torch.stack([token.hidden for token in waiting]) if waiting else None,
            pending_positions=np.array([token.position for token in waiting], dtype=np.int64),
            observers=[],
            experts=self._step_experts(requests, owners, segments, first_rows),
            weak=weak,
        )
        step.observers.extend(self._observers.observers(step))
        return step

    def commit(self, step: RoutedStep, residual: Callable[[IntArray], torch.Tensor]) -> StepOutcome:
        """Store what the step decided.

        Args:
            step: that has run.
            residual: gives the residual stream of step rows as the loop left it, (rows, hidden).
        """
        decisions = StepDecisions()
        for observer in step.observers:
            observer.commit(decisions)
        depths: dict[int, int] = {}
        tested: set[int] = set()
        for index, state in step.states.items():
            row = step.new_token_row(index)
            if row is None or not state.records_tokens:
                continue
            depth = decisions.exits.get(row, self._num_layers - 1)
            if state.extra.policy.exit is not None:
                depths[index] = depth
            if row in decisions.exits:
                tested.add(index)
            if state.history is not None:
                state.history.note(decisions.exits.get(row))
            if state.pending is not None:
                if depth == self._num_layers - 1:
                    state.pending.clear()
                else:
                    rows = np.arange(row - len(state.pending.tokens), row + 1)
                    position = step.last_position(index)
                    state.pending.leave(position, depth, residual(rows).clone())
                state.decide_token(state.wanted)
            elif row in decisions.void:
                state.decide_token(state.wanted.without_blocks(decisions.void[row], fill=True))
            else:
                state.decide_token(state.wanted.leaving_after(depth, fill=True))
        return StepOutcome(self._segments_as_run(step, depths), depths, frozenset(tested))

    def _segments_as_run(self, step: RoutedStep, depths: dict[int, int]) -> list[Segment]:
        """Segments with what was decided on the way."""
        final: list[Segment] = []
        for segment, following in zip(step.segments, [*step.segments[1:], None], strict=True):
            state, mask = step.states.get(segment.request), segment.mask
            last = following is None or following.request != segment.request
            if state is not None and segment.phase == PREFILL:
                mask = state.prompt_mask_as_run(mask)
            elif state is not None and segment.request in depths and (last or segment.pending):
                base = self.table.mask(mask)
                fill = state.pending is None
                mask = state.hold(base.leaving_after(depths[segment.request], fill=fill))
            final.append(segment._replace(mask=mask))
        return final

    def _agree(self, requests: StepRequests, states: dict[int, RequestState]) -> None:
        """The step's elastic generated tokens agree on their largest common skip."""
        elastic = [
            state
            for index, state in states.items()
            if state.extra.policy.skip.elastic
            and state.has_new_token(int(requests.computed[index]), int(requests.scheduled[index]))
        ]
        if elastic:
            common = np.logical_and.reduce([state.wanted.skip for state in elastic])
            for state in elastic:
                state.agree(common)

    def _plan(self, segments: tuple[Segment, ...], requests: int) -> StepPlan:
        plan = self._plans.get(segments)
        if plan is None:
            if len(self._plans) >= _MAX_CACHED_PLANS:
                self._plans.clear()
            plan = build_plan(
                segments, requests, self.table.skip, self.table.fill, self.plan_layers
            )
            self._plans[segments] = plan
        return plan

    def _weak_passes(
        self,
        requests: StepRequests,
        blocks: Mapping[str, BlockIds],
        first_rows: IntArray,
        rows: int,
    ) -> WeakPasses | None:
        contrasts = {} if self.experts is None else self.experts.contrasts(requests.ids)
        if not contrasts:
            return None
        own = {index: blocks[requests.ids[index]] for index in contrasts}
        return WeakPasses.from_contrasts(contrasts, own, first_rows, requests.scheduled, rows)

    def _step_experts(
        self,
        requests: StepRequests,
        owners: IntArray,
        segments: list[Segment],
        first_rows: IntArray,
    ) -> StepExperts | None:
        if self.experts is None:
            return None
        return self.experts.step(
            requests.ids, owners, segments, requests.computed, requests.scheduled, first_rows
        )


def _stock_segments(index: int, computed: int, scheduled: int, prompt: int) -> list[Segment]:
    prefill = min(max(prompt - computed, 0), scheduled)
    parts = ((PREFILL, prefill), (DECODE, scheduled - prefill))
    return [Segment(index, phase, FULL_DEPTH, length) for phase, length in parts if length]
