"""Expert controls of the requests in the batch, as rows of a table that keeps equal ones once.

A token carries the number of its row, as with depth masks (`sluice.models.depth.masks`); row 0 is
vLLM's own choice. A layer's part of the table is what the routing operations read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.ops.routing_args import DROPPED, FORCED, PROTECTED, PolicyTable
from sluice.models.experts.controls import LayerControls
from sluice.models.policy.axes import IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import STOCK_EXPERTS, ExpertId, ExpertPolicy
from sluice.models.policy.row_table import FIRST_ROW, RowTable

STOCK_ROW = FIRST_ROW


class ExpertTable:
    """Reference-counted controls.

    Attributes:
        active: bool, (rows, layers with experts); True where a row's controls do something.
    """

    def __init__(
        self, shape: ExpertShape, super_experts: Iterable[ExpertId], device: torch.device
    ) -> None:
        self._shape = shape
        self._super_experts = tuple(super_experts)
        self._device = device
        stock = LayerControls.from_policy(STOCK_EXPERTS, shape, ())
        self._row_ids = RowTable((STOCK_EXPERTS, False))
        self._rows = [stock]
        self._layers: list[PolicyTable] | None = None
        self.active = stock.active[np.newaxis].copy()

    def acquire(self, policy: ExpertPolicy, *, weak: bool = False) -> int:
        """Row of a policy, or of the weak pass of its contrast."""
        row, is_new = self._row_ids.acquire((policy, weak))
        if is_new:
            self._rows[row : row + 1] = [
                LayerControls.from_policy(policy, self._shape, self._super_experts, weak=weak)
            ]
            self.active = np.stack([controls.active for controls in self._rows])
            self._layers = None
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        self._row_ids.release(row)

    def layer(self, moe_index: int) -> PolicyTable:
        """All rows' controls in one layer. `moe_index`: its place among those with experts."""
        if self._layers is None:
            self._layers = _packed(self._rows, len(self._shape.layers), self._device)
        return self._layers[moe_index]

    def widths(self, rows: IntArray) -> list[int]:
        """Most experts that a token with one of `rows` can have, by layer with experts."""
        used = [self._rows[row] for row in np.unique(rows).tolist()]
        most = np.max([controls.k for controls in used], axis=0)
        put_back = np.any([controls.protected.any(axis=1) for controls in used], axis=0)
        widths: list[int] = (most + put_back * self._shape.top_k).tolist()
        return widths


def _packed(rows: Sequence[LayerControls], layers: int, device: torch.device) -> list[PolicyTable]:
    """The table of each layer."""

    def stacked(name: str) -> NDArray[Any]:
        return np.stack([getattr(controls, name) for controls in rows], axis=1)

    bias = stacked("bias")
    marks = DROPPED * stacked("dropped") | FORCED * stacked("forced")
    marks = (marks | PROTECTED * stacked("protected")).astype(np.uint8)
    ranks = np.broadcast_to([controls.weak_rank for controls in rows], (layers, len(rows)))
    changes = (bias != 0).any(-1) | (marks != 0).any(-1)
    arrays = (
        np.stack([stacked("k"), ranks, changes], -1).astype(np.int32),
        np.stack([stacked("ratio"), stacked("top_p")], -1),
        bias,
        marks,
        stacked("forced_weight"),
    )
    parts = [torch.from_numpy(array).to(device) for array in arrays]
    return [PolicyTable(*(part[layer] for part in parts)) for layer in range(layers)]
