"""The routers of a loaded model, with policies: logits in, experts and weights out.

vLLM's router objects ask here (`sluice.models.vllm_adapter.routers`). Rows without a control get
what vLLM's own routine gives, bit for bit; in a step without any, nothing else runs but a count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sluice.kernels.ops.batch_budget import LYNX, OEA, XSHARE, batch_budget
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_scores import plain_scores, router_scores
from sluice.kernels.ops.routing_args import EXTRA, PolicyTable, RouterSpec, Shared
from sluice.models.experts.routing_counts import StepSums, StockCounts
from sluice.models.experts.selection import CallRows, LayerRows, StepExperts
from sluice.models.policy.axes import IntArray
from sluice.models.policy.experts import BudgetMethod, ExpertBudget
from sluice.models.telemetry.expert_counters import ExpertCounters

_METHODS = {BudgetMethod.OEA: OEA, BudgetMethod.XSHARE: XSHARE, BudgetMethod.LYNX: LYNX}


def shared_set(budget: ExpertBudget, choice: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts that the rows share.

    Args:
        budget: of all of them.
        choice: fp32, (rows, experts), selection scores.
        scores: fp32, (rows, experts), what weights are made of.

    Returns:
        bool, (experts,).
    """
    size = budget.k0 if budget.method is BudgetMethod.OEA else budget.experts
    assert size is not None
    return batch_budget(choice, scores, _METHODS[budget.method], size)


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
        self._specs = [(spec, spec.numbers, spec.corrections.to(device)) for spec in specs]
        self._counters = counters
        self._counts = StockCounts(counters, device)
        self._layers = counters.layers
        # vLLM's CPU kernel runs whatever id a slot has; the others leave out what is no expert.
        self._repeat = device.type == "cpu"
        self._nothing = Shared.nothing(counters.total.shape[1] - EXTRA, device)
        self._step: StepExperts | None = None
        self._call: CallRows | None = None

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
            self._call = self._step.call(tokens, dropped)

    def end(self) -> None:
        """Leave what follows to vLLM."""
        if self._step is not None:
            self._step.counts.leave()
        self._step = self._call = None

    def roll(self) -> None:
        """Bring the counters up to date; called once a step."""
        self._counts.publish()
        self._counters.roll()

    def sums(self, step: StepExperts) -> StepSums:
        """Count what the routers did in a step that has ended; once for each."""
        return step.counts.close(self._counters.total)

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
        counts = step.counts.tensors
        asked = call.controlled(place, self._layers[place])
        if asked is None:
            weights, ids = stock()
            count_selections(ids, call.owners, counts, place)
            return weights, ids
        _, numbers, correction = self._specs[place]
        table = step.table.layer(place)
        return route_topk(
            logits,
            list(stock()) if asked.left else [],
            asked.rows,
            self._shared(place, logits, asked, table),
            table,
            counts,
            correction,
            place,
            *numbers,
            asked.width,
            self._repeat,
        )

    def _shared(
        self, place: int, logits: torch.Tensor, asked: LayerRows, table: PolicyTable
    ) -> Shared:
        """References of the re-mixed rows, and the sets of the budgets."""
        if not asked.remixes and not asked.budgets:
            return self._nothing
        spec, _, correction = self._specs[place]
        shared = self._nothing
        if asked.remixes:
            references = []
            for pathway, own in asked.remixes:
                scores = plain_scores(logits[own], spec.sigmoid)
                reference = pathway.reference(self._layers[place], scores)
                references.append(reference.expand_as(scores))
            joined = torch.cat(references).float()
            shared = Shared(joined, asked.alpha, asked.top, self._nothing.within)
        if asked.budgets:
            numbers = spec.score_numbers
            scores, choice = router_scores(logits, asked.rows, shared, table, correction, *numbers)
            sets = [shared_set(each, choice[own], scores[own]) for each, own in asked.budgets]
            shared = Shared(*shared[:3], torch.stack(sets))
        return shared
