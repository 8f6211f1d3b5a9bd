"""What the rows of one step ask of the routers, laid out once for all calls of them.

A step (`StepExperts`) runs parts of its rows through the layers; each part that runs together is a
call (`CallRows`), and what it asks of a layer (`LayerRows`) is made once for all layers alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.ops.routing_args import RouteRows
from sluice.models.experts.policy_table import STOCK_ROW, ExpertTable
from sluice.models.experts.remix import Pathway
from sluice.models.experts.routing_counts import RoutingCounts
from sluice.models.policy.axes import BoolArray, IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertBudget

_Remixes = list[tuple[Pathway, IntArray]]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one call of a router, not all of them left to vLLM.

    Attributes:
        rows: as the routing operations take them.
        has_stock_rows: some rows are left to vLLM.
        width: most experts that one of the others can have.
        budgets: budgets in the order of `rows.set_index`, with their rows, int64.
        remixes: pathways with their rows, int64, which `rows.remix_index` numbers in this order.
        alpha: fp32, (re-mixed rows,).
        top: int32, (re-mixed rows,).
    """

    rows: RouteRows
    has_stock_rows: bool
    width: int
    budgets: tuple[tuple[ExpertBudget, torch.Tensor], ...]
    remixes: tuple[tuple[Pathway, torch.Tensor], ...]
    alpha: torch.Tensor
    top: torch.Tensor


class StepExperts:
    """Expert controls of a step's token rows.

    Attributes:
        table: of the policies of the batch.
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
            table: of the policies of the batch.
            shape: of the model's experts.
            device: of the model.
            table_rows: row of each token, int64, (tokens,).
            budgets: tokens that share a budget, int64.
            remixes: tokens that a pathway applies to, int64.
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
            dropped: indices among them of rows whose output is dropped, int64.
        """
        key = (tokens.tobytes(), dropped.tobytes())
        if key not in self._calls:
            budgets = [(each, _rows_of(tokens, members)) for each, members in self._budgets.items()]
            remixes = [(each, _rows_of(tokens, members)) for each, members in self._remixes]
            token_index = tokens.copy()
            token_index[dropped] = -1
            self._calls[key] = CallRows(
                tokens,
                self.table,
                self._table_rows[tokens],
                torch.from_numpy(token_index).to(self.device),
                [(each, rows) for each, rows in budgets if len(rows)],
                [(each, rows) for each, rows in remixes if len(rows)],
            )
        return self._calls[key]


class CallRows:
    """One set of rows on its way through routers.

    Attributes:
        tokens: rows of the step, ascending, int64, (rows,).
        token_index: the same, -1 where output is dropped, on the device.
    """

    def __init__(
        self,
        tokens: IntArray,
        table: ExpertTable,
        table_rows: IntArray,
        token_index: torch.Tensor,
        budgets: list[tuple[ExpertBudget, IntArray]],
        remixes: _Remixes,
    ) -> None:
        self.tokens = tokens
        self.token_index = token_index
        self._budgets = budgets
        self._remixes = remixes
        self._table_rows = table_rows
        self._active = np.ascontiguousarray(table.active[table_rows].T)
        self._widths = table.widths(table_rows)
        self._cache: dict[tuple[bytes, int, tuple[int, ...]], LayerRows | None] = {}

    def controlled(self, moe_index: int, layer: int) -> LayerRows | None:
        """What rows ask that are not left to vLLM, or None if all are.

        Args:
            moe_index: the layer's place among those with experts.
            layer: its number in the decoder.
        """
        active, width = self._active[moe_index], self._widths[moe_index]
        remixes = tuple(
            number
            for number, (pathway, _) in enumerate(self._remixes)
            if layer in pathway.remix.layers
        )
        key = (active.tobytes(), width, remixes)
        if key not in self._cache:
            self._cache[key] = self._rows(active, width, [self._remixes[n] for n in remixes])
        return self._cache[key]

    def _rows(self, active: BoolArray, width: int, remixes: _Remixes) -> LayerRows | None:
        count = len(active)
        set_index = _numbered(count, [rows for _, rows in self._budgets], by_part=True)
        remix_index = _numbered(count, [rows for _, rows in remixes], by_part=False)
        for index in (set_index, remix_index):
            if len(index):
                active = active | (index >= 0)
        if not active.any():
            return None
        device = self.token_index.device

        def there(array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(device, dtype)

        lengths = [len(rows) for _, rows in remixes]
        alpha = np.repeat([pathway.remix.alpha for pathway, _ in remixes], lengths)
        top = np.repeat([pathway.remix.top for pathway, _ in remixes], lengths)
        return LayerRows(
            rows=RouteRows(
                policy_index=there(np.where(active, self._table_rows, STOCK_ROW), torch.int32),
                token_index=self.token_index,
                remix_index=there(remix_index, torch.int32),
                set_index=there(set_index, torch.int32),
            ),
            has_stock_rows=not active.all(),
            width=width,
            budgets=tuple((each, there(rows, torch.int64)) for each, rows in self._budgets),
            remixes=tuple((each, there(rows, torch.int64)) for each, rows in remixes),
            alpha=there(alpha, torch.float32),
            top=there(top, torch.int32),
        )


def _rows_of(tokens: IntArray, members: IntArray) -> IntArray:
    """Which rows of a call have one of the tokens `members`."""
    return np.flatnonzero(np.isin(tokens, members))


def _numbered(count: int, parts: list[IntArray], *, by_part: bool) -> IntArray:
    """Numbers of the rows of some parts, -1 for all other rows; (0,) without parts.

    Args:
        count: rows.
        parts: rows of each part.
        by_part: rows have the number of their part, else each row has its own.
    """
    if not parts:
        return np.zeros(0, dtype=np.int64)
    rows = np.concatenate(parts)
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    index = np.full(count, -1, dtype=np.int64)
    index[rows] = numbers if by_part else np.arange(len(rows))
    return index
