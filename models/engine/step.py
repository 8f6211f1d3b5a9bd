"""A step with routed requests: its requests, its plan, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sluice.models.depth.masks import Segment
from sluice.models.engine.observers import LayerObserver
from sluice.models.engine.plan import StepPlan
from sluice.models.engine.request_state import RequestState
from sluice.models.experts.contrast import WeakPasses
from sluice.models.experts.selection import StepExperts
from sluice.models.policy.axes import IntArray


@dataclass(frozen=True, slots=True)
class StepRequests:
    """The requests of one step in batch order; arrays are int64, (requests,).

    Attributes:
        ids: vLLM's request ids.
        scheduled: tokens scheduled in this step.
        computed: tokens computed before it.
        prompt: length of the client's prompt.
    """

    ids: Sequence[str]
    scheduled: IntArray
    computed: IntArray
    prompt: IntArray

    @property
    def generated(self) -> int:
        """Scheduled tokens that were generated before."""
        prefill = np.clip(self.prompt - self.computed, 0, self.scheduled)
        return int((self.scheduled - prefill).sum())


@dataclass(frozen=True, slots=True)
class RoutedStep:
    """A step with at least one routed request.

    Attributes:
        requests: whose step it is.
        segments: its tokens in batch order.
        plan: which rows run what, before anything is decided.
        first_rows: first scheduled row of each request, int64, (requests,).
        states: of the routed requests, by batch index.
        pending: residual streams of the pending rows in row order, (rows, hidden), or None.
        pending_positions: their positions, int64, (rows,).
        observers: who decides while it runs.
        experts: expert controls of its tokens, or None.
        weak: weak passes of contrasts, whose rows come last, or None.
    """

    requests: StepRequests
    segments: list[Segment]
    plan: StepPlan
    first_rows: IntArray
    states: dict[int, RequestState]
    pending: torch.Tensor | None
    pending_positions: IntArray
    observers: list[LayerObserver]
    experts: StepExperts | None = None
    weak: WeakPasses | None = None

    @property
    def reads_stream(self) -> bool:
        """Whether the residual stream is read after the final norm: by rows that wait, and for the
        logits of weak passes."""
        waits = any(state.pending is not None for state in self.states.values())
        return waits or self.weak is not None

    @property
    def passes(self) -> int:
        """Requests in the batch and weak passes behind them."""
        return len(self.requests.ids) + (0 if self.weak is None else len(self.weak.owners))

    def owner(self, number: int) -> int:
        """Batch index of a pass's request. `number`: as in segments, weak passes past the end."""
        requests = len(self.requests.ids)
        if number < requests:
            return number
        assert self.weak is not None
        return int(self.weak.owners[number - requests])

    @property
    def stock(self) -> bool:
        """Whether vLLM's own forward serves the step."""
        routes = self.experts is not None and self.experts.controlled
        return self.plan.full_depth and not self.observers and self.pending is None and not routes

    def known_logits(self) -> tuple[IntArray, torch.Tensor] | None:
        """Batch indices of requests whose exit test has their logits, (rows, vocabulary)."""
        answers = [answer for observer in self.observers for answer in observer.answers]
        if not answers:
            return None
        rows = np.concatenate([tokens for tokens, _ in answers])
        return self.plan.shape.requests[rows], torch.cat([logits for _, logits in answers])

    def last_position(self, index: int) -> int:
        """Position of a request's last token in this step."""
        return int(self.requests.computed[index] + self.requests.scheduled[index]) - 1

    def positions(self, index: int) -> range:
        """Positions of a request's tokens in this step."""
        start = int(self.requests.computed[index])
        return range(start, start + int(self.requests.scheduled[index]))

    def rows(self, index: int, positions: IntArray) -> IntArray:
        """Rows of a request's tokens at some of these positions."""
        return int(self.first_rows[index]) - int(self.requests.computed[index]) + positions

    def new_token_row(self, index: int) -> int | None:
        """Row of a request's generated token that runs for the first time, if there is one."""
        scheduled = int(self.requests.scheduled[index])
        if not self.states[index].has_new_token(int(self.requests.computed[index]), scheduled):
            return None
        return int(self.first_rows[index]) + scheduled - 1


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the tokens of a step ran.

    Attributes:
        segments: its segments with the masks that their tokens ran.
        exit_layers: by batch index, the layer after which a new token under an exit rule left.
        tested: batch indices whose new token an exit rule was asked about; `recompute` lets some
            run all layers untested, and `sparing` as well.
    """

    segments: list[Segment]
    exit_layers: dict[int, int]
    tested: frozenset[int]
