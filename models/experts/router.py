"""The routers of a loaded model, with policies: logits in, experts and weights out.

vLLM's router objects ask here (`sluice.models.vllm_adapter.routers`). Rows without a control get
what vLLM's own routine gives, bit for bit; in a step without any, nothing else runs but a count.

Decode rows with equal batch budgets share a set of experts, which their scores in a layer decide on
before any of them selects (`sluice.kernels.ops.batch_budget`); what such a row gets depends on the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sluice.kernels.ops.batch_budget import LYNX, OEA, XSHARE, batch_budget
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_scores import plain_scores, router_scores
from sluice.kernels.ops.routing_args import PolicyTable, RouterSpec, Selection, Shared
from sluice.models.experts.routing_counts import Selections, StockCounts
from sluice.models.experts.selection import CallRows, LayerRows, StepExperts
from sluice.models.policy.axes import IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import BudgetMethod, ExpertBudget

Routed = tuple[torch.Tensor, torch.Tensor]
"""Weights, fp32, and ids, int32, (rows, width) each."""

_METHODS = {BudgetMethod.OEA: OEA, BudgetMethod.XSHARE: XSHARE, BudgetMethod.LYNX: LYNX}
_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)


class ExpertRouter:
    """Routes the layers of one model; one instance per model runner."""

    def __init__(
        self, specs: Sequence[RouterSpec], shape: ExpertShape, device: torch.device
    ) -> None:
        """Serve layers.

        Args:
            specs: of the layers with experts, in order.
            shape: of the experts.
            device: of the model.
        """
        self._specs = [spec.to(device) for spec in specs]
        self._stock_counts = StockCounts(len(shape.layers), shape.experts, device)
        self._layers = shape.layers
        # vLLM's CPU kernel runs whatever id a slot has; the others leave out what is no expert.
        self._repeat = device.type == "cpu"
        self._nothing_shared = Shared.nothing(shape.experts, device)
        self._no_stock = Selection.nothing(device)
        self._step: StepExperts | None = None
        self._call: CallRows | None = None

    def begin(self, step: StepExperts) -> None:
        """Serve a step with controls."""
        self._step = step

    def enter(self, tokens: IntArray, dropped: IntArray = _NO_ROWS) -> None:
        """Name the rows of the step that the next call is about.

        Args:
            tokens: ascending, int64, (rows,).
            dropped: indices among them of rows whose output is dropped, int64.
        """
        if self._step is not None:
            self._call = self._step.call(tokens, dropped)

    def end(self) -> None:
        """Leave what follows to vLLM."""
        if self._step is not None:
            self._step.counts.send()
        self._step = self._call = None

    def send_selections(self) -> Selections:
        """Send what steps without controls have selected since the last time to the host."""
        return self._stock_counts.send()

    def route(self, moe_index: int, logits: torch.Tensor, stock: Callable[[], Routed]) -> Routed:
        """Select experts for the rows of one layer.

        Args:
            moe_index: the layer's place among those with experts.
            logits: router logits, (rows, experts).
            stock: vLLM's own routine on the same rows.
        """
        call, step = self._call, self._step
        if call is None or step is None:
            weights, ids = stock()
            self._stock_counts.add(moe_index, ids)
            return weights, ids
        counts = step.counts.tensors
        controlled = call.controlled(moe_index, self._layers[moe_index])
        if controlled is None:
            weights, ids = stock()
            count_selections(ids, call.token_index, counts, moe_index)
            return weights, ids
        table = step.table.layer(moe_index)
        return route_topk(
            logits,
            controlled.rows,
            self._shared(moe_index, logits, controlled, table),
            table,
            self._specs[moe_index],
            Selection(*stock()) if controlled.has_stock_rows else self._no_stock,
            counts,
            moe_index,
            controlled.width,
            self._repeat,
        )

    def _shared(
        self, moe_index: int, logits: torch.Tensor, controlled: LayerRows, table: PolicyTable
    ) -> Shared:
        """References of the re-mixed rows, and the sets of the budgets."""
        shared, spec = self._nothing_shared, self._specs[moe_index]
        if controlled.remixes:
            references = []
            for pathway, rows in controlled.remixes:
                scores = plain_scores(logits[rows], spec.sigmoid)
                reference = pathway.reference(self._layers[moe_index], scores)
                references.append(reference.expand_as(scores))
            shared = Shared(
                references=torch.cat(references).float(),
                alpha=controlled.alpha,
                top=controlled.top,
                members=shared.members,
            )
        if controlled.budgets:
            scores, choice = router_scores(logits, controlled.rows, shared, table, spec)
            sets = [
                shared_set(budget, choice[rows], scores[rows])
                for budget, rows in controlled.budgets
            ]
            shared = Shared(shared.references, shared.alpha, shared.top, torch.stack(sets))
        return shared


def shared_set(budget: ExpertBudget, choice: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts that rows with one budget share.

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
