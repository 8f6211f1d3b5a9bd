"""What the rows of one step ask of the routers, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.ops.routing_args import RouteRows
from sluice.models.experts.policy_table import STOCK_ROW, ExpertTable
from sluice.models.experts.remix import Pathway
from sluice.models.experts.routing_counts import RoutingCounts
from sluice.models.policy.axes import IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertBudget

_Remixes = list[tuple[Pathway, IntArray]]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one call of a router, not all of them left to vLLM.

    Attributes:
        rows: as the routing operations take them.
        left: some rows are left to vLLM.
        width: most experts that one of the others can have.
        budgets: budgets in the order of `rows.sets`, with their rows, int64.
        remixes: pathways with their rows, int64, which `rows.pulls` numbers in this order.
        alpha: fp32, (re-mixed rows,).
        top: int32, (re-mixed rows,).
    """

    rows: RouteRows
    left: bool
    width: int
    budgets: tuple[tuple[ExpertBudget, torch.Tensor], ...]
    remixes: tuple[tuple[Pathway, torch.Tensor], ...]
    alpha: torch.Tensor
    top: torch.Tensor


class StepExperts:
    """Expert controls of a step's token rows.

    Attributes:
        table: of the live policies.
        counts: what its routers did.
        device: of the model.
    """

    def __init__(
        self,
        table: ExpertTable,
        shape: ExpertShape,
        device: torch.device,
        table_rows: IntArray,
        budgets: dict[ExpertBudget, IntArray],
        remixes: _Remixes,
    ) -> None:
        """Describe a step.

        Args:
            table: of the live policies.
            shape: of the model's experts.
            device: of the model.
            table_rows: row of each token, int64, (tokens,).
            budgets: token rows that share a budget, int64.
            remixes: token rows that a pathway applies to, int64.
        """
        self.table = table
        self.device = device
        self.counts = RoutingCounts(len(table_rows), len(shape.layers), shape.experts, device)
        self._table_rows = table_rows
        self._budgets = budgets
        self._remixes = remixes
        self._calls: dict[tuple[bytes, bytes], CallRows] = {}

    @property
    def controlled(self) -> bool:
        """Whether any row is not left to vLLM."""
        return bool(self._table_rows.any() or self._budgets or self._remixes)

    def call(self, tokens: IntArray, dropped: IntArray) -> CallRows:
        """The rows that a router is about to see.

        Args:
            tokens: ascending, int64, (rows,).
            dropped: places of those whose output is dropped, int64.
        """
        key = (tokens.tobytes(), dropped.tobytes())
        if key not in self._calls:
            budgets = [(each, _places(tokens, own)) for each, own in self._budgets.items()]
            remixes = [(each, _places(tokens, own)) for each, own in self._remixes]
            owners = tokens.copy()
            owners[dropped] = -1
            self._calls[key] = CallRows(
                tokens,
                self.table,
                self._table_rows[tokens],
                torch.from_numpy(owners).to(self.device),
                [(each, own) for each, own in budgets if len(own)],
                [(each, own) for each, own in remixes if len(own)],
            )
        return self._calls[key]


class CallRows:
    """One set of rows on its way through routers.

    Attributes:
        tokens: rows of the step, ascending, int64, (rows,).
        owners: the same, -1 where output is dropped, on the device.
    """

    def __init__(
        self,
        tokens: IntArray,
        table: ExpertTable,
        table_rows: IntArray,
        owners: torch.Tensor,
        budgets: list[tuple[ExpertBudget, IntArray]],
        remixes: _Remixes,
    ) -> None:
        self.tokens = tokens
        self.owners = owners
        self._budgets = budgets
        self._remixes = remixes
        self._table_rows = table_rows
        self._active = np.ascontiguousarray(table.active[table_rows].T)
        self._widths = table.widths(table_rows)
        self._cache: dict[tuple[bytes, int, tuple[int, ...]], LayerRows | None] = {}

    def controlled(self, place: int, layer: int) -> LayerRows | None:
        """What rows ask that are not left to vLLM, or None if all are.

        Args:
            place: of the layer among those with experts.
            layer: its number in the decoder.
        """
        active, width = self._active[place], self._widths[place]
        remixes = tuple(
            number
            for number, (pathway, _) in enumerate(self._remixes)
            if layer in pathway.remix.layers
        )
        key = (active.tobytes(), width, remixes)
        if key not in self._cache:
            self._cache[key] = self._rows(active, width, [self._remixes[n] for n in remixes])
        return self._cache[key]

    def _rows(self, asked: NDArray[np.bool_], width: int, remixes: _Remixes) -> LayerRows | None:
        sets = _numbered(len(asked), [own for _, own in self._budgets], each=False)
        pulls = _numbered(len(asked), [own for _, own in remixes], each=True)
        for places in (sets, pulls):
            if len(places):
                asked = asked | (places >= 0)
        if not asked.any():
            return None
        device = self.owners.device
        policies = np.where(asked, self._table_rows, STOCK_ROW)

        def there(array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(device, dtype)

        lengths = [len(own) for _, own in remixes]
        alpha = np.repeat([pathway.remix.alpha for pathway, _ in remixes], lengths)
        top = np.repeat([pathway.remix.top for pathway, _ in remixes], lengths)
        return LayerRows(
            rows=RouteRows(
                policies=there(policies, torch.int32),
                owners=self.owners,
                pulls=there(pulls, torch.int32),
                sets=there(sets, torch.int32),
            ),
            left=not asked.all(),
            width=width,
            budgets=tuple((each, there(own, torch.int64)) for each, own in self._budgets),
            remixes=tuple((each, there(own, torch.int64)) for each, own in remixes),
            alpha=there(alpha, torch.float32),
            top=there(top, torch.int32),
        )


def _places(tokens: IntArray, own: IntArray) -> IntArray:
    """Where `own` are among `tokens`."""
    return np.flatnonzero(np.isin(tokens, own))


def _numbered(rows: int, parts: list[IntArray], *, each: bool) -> IntArray:
    """Number of the part that a row is in, or its place in all parts together; -1 for none.

    Empty if there are no parts.
    """
    if not parts:
        return np.zeros(0, dtype=np.int64)
    found = np.full(rows, -1, dtype=np.int64)
    start = 0
    for number, own in enumerate(parts):
        found[own] = np.arange(start, start + len(own)) if each else number
        start += len(own)
    return found
