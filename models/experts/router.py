"""The routers of a loaded model, with policies: logits in, experts and weights out.

vLLM's router objects ask here (`sluice.models.seams.router`). Rows without a control get what
vLLM's own routine gives, bit for bit; in a step without any, nothing else runs but a count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from sluice.kernels.remix_scores import remix_scores
from sluice.kernels.route_topk import (
    RouterSpec,
    Selection,
    score,
    select,
    select_rank,
    selection_scores,
)
from sluice.models.expert_counters import ExpertCounters
from sluice.models.experts.budget import shared_set
from sluice.models.experts.ledger import StepSums
from sluice.models.experts.live_counts import LiveCounts
from sluice.models.experts.remix import Pathway
from sluice.models.experts.selection import CallRows, IntArray, LayerRows, StepExperts

Routed = tuple[torch.Tensor, torch.Tensor]
"""Weights, fp32, and ids, int32, (rows, width) each."""

_NONE: IntArray = np.zeros(0, dtype=np.int64)


class ExpertRouter:
    """Routes the layers of one model; one instance per model runner."""

    def __init__(
        self, specs: Sequence[RouterSpec], counters: ExpertCounters, device: torch.device
    ) -> None:
        """Serve layers.

        Args:
            specs: of the layers with experts, in order.
            counters: of the same layers.
            device: of the model.
        """
        self._specs = tuple(specs)
        self._counters = counters
        self._counts = LiveCounts(counters, device)
        self._layers = counters.layers
        self._step: StepExperts | None = None
        self._call: CallRows | None = None
        self._dropped = _NONE

    def begin(self, step: StepExperts) -> None:
        """Serve a step with controls."""
        self._step = step

    def enter(self, tokens: IntArray, dropped: IntArray = _NONE) -> None:
        """Name the rows of the step that the next call is about.

        Args:
            tokens: ascending, int64, (rows,).
            dropped: places of those whose output is dropped, int64.
        """
        if self._step is not None:
            self._call = self._step.call(tokens)
            self._dropped = dropped

    def end(self) -> None:
        """Leave what follows to vLLM."""
        self._step = self._call = None

    def roll(self) -> None:
        """Bring the counters up to date; called once a step."""
        self._counts.publish()
        self._counters.roll()

    def sums(self, step: StepExperts) -> StepSums:
        """Count what the routers did in a step that has ended; once for each."""
        return step.ledger.close(self._counters.total)

    def route(self, place: int, logits: torch.Tensor, stock: Callable[[], Routed]) -> Routed:
        """Select experts for the rows of one layer.

        Args:
            place: of the layer among those with experts.
            logits: router logits, (rows, experts).
            stock: vLLM's own routine on the same rows.
        """
        call, step = self._call, self._step
        if call is None or step is None:
            weights, ids = stock()
            self._counts.add(place, ids)
            return weights, ids
        rows = call.controlled(place, self._layers[place])
        if rows is not None and rows.everything:
            chosen = self._select(place, logits, rows)
        else:
            chosen = _untouched(*stock())
        if rows is not None and not rows.everything:
            index = torch.from_numpy(rows.rows).to(logits.device)
            chosen = _overridden(chosen, index, self._select(place, logits[index], rows))
        step.ledger.write(place, call.tokens, self._dropped, chosen)
        return chosen.weights, chosen.ids

    def _select(self, place: int, logits: torch.Tensor, rows: LayerRows) -> Selection:
        assert self._step is not None
        table, spec = self._step.table, self._specs[place]
        controls = table.controls(rows.table_rows, place)
        stock_scores = scores = score(logits, spec)
        for pathway, own in rows.remixes:
            scores = _remixed(scores, own.to(logits.device), pathway, self._layers[place])
        changed = controls.bias is not None or controls.forced is not None
        stock_choice = choice = selection_scores(stock_scores, spec)
        if changed or rows.remixes:
            choice = selection_scores(scores, spec, controls)
        for budget, own in rows.budgets:
            own = own.to(logits.device)
            # A forced expert is nobody's choice: it serves beside the set.
            plain = selection_scores(scores, spec, replace(controls, forced=None))
            plain = torch.where(choice == float("inf"), plain, choice)
            members = shared_set(budget, plain[own], scores[own])
            if controls.protected is not None:
                stock = stock_choice[own].topk(spec.top_k, dim=-1).indices
                selected = torch.zeros_like(choice[own], dtype=torch.bool).scatter_(1, stock, True)
                members = members | (selected & controls.protected.expand(len(choice), -1)[own])
            choice = _within(choice, own, members)
        starving = bool(rows.budgets)
        chosen = select(scores, choice, stock_choice, spec, controls, starving=starving)
        if rows.weak:
            ranks = table.weak_ranks(rows.table_rows)
            weak = np.flatnonzero(ranks >= 0)
            own = torch.from_numpy(weak).to(logits.device)
            of_weak = torch.from_numpy(ranks[weak]).to(logits.device)
            chosen = _overridden(chosen, own, select_rank(choice[own], of_weak, spec))
        return chosen


def _untouched(weights: torch.Tensor, ids: torch.Tensor) -> Selection:
    active = torch.full((len(ids),), ids.shape[1], device=ids.device)
    return Selection(weights, ids, active, torch.zeros_like(active))


def _remixed(scores: torch.Tensor, own: torch.Tensor, pathway: Pathway, layer: int) -> torch.Tensor:
    """Scores with the rows `own` pulled towards their reference."""
    rows = scores[own]
    remix = pathway.remix
    reference = pathway.reference(layer, rows).expand_as(rows)
    alpha = torch.full((len(rows),), remix.alpha, device=rows.device)
    top = torch.full((len(rows),), remix.top, device=rows.device)
    return scores.index_copy(0, own, remix_scores(rows, reference, alpha, top))


def _within(choice: torch.Tensor, own: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Selection scores of rows limited to a set; what is forced stays at +inf.

    Args:
        choice: (all rows, experts).
        own: the rows, int64, (rows,).
        members: bool, (experts,) or (rows, experts).
    """
    rows = choice[own]
    outside = ~members & (rows < float("inf"))
    return choice.index_copy(0, own, rows.masked_fill(outside, float("-inf")))


def _overridden(base: Selection, index: torch.Tensor, own: Selection) -> Selection:
    """`base` with the rows at `index` replaced; short rows repeat their first expert."""
    width = max(base.ids.shape[1], own.ids.shape[1])
    ids, weights = _widened(base, width)
    ids[index], weights[index] = _widened(own, width)
    active, taken = base.active.clone(), base.taken.clone()
    active[index], taken[index] = own.active, own.taken
    return Selection(weights, ids, active, taken)


def _widened(selection: Selection, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    more = width - selection.ids.shape[1]
    if not more:
        return selection.ids, selection.weights
    ids = torch.cat([selection.ids, selection.ids[:, :1].expand(-1, more)], 1)
    return ids, torch.nn.functional.pad(selection.weights, (0, more))
