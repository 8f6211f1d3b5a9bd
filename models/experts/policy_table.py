"""Expert controls of the requests in the batch as rows of deduplicated tables.

As with depth masks (`sluice.models.depth.masks`), a batch holds many tokens and few distinct
policies; a token carries a row number. Row 0 is vLLM's own choice and is never released.
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

STOCK_ROW = 0


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
        stock = LayerControls.of(STOCK_EXPERTS, shape, ())
        self._rows: list[LayerControls] = [stock]
        self._users = [1]
        self._row_of: dict[tuple[ExpertPolicy, bool], int] = {}
        self._layers: list[PolicyTable] | None = None
        self.active = stock.active[np.newaxis].copy()

    def acquire(self, policy: ExpertPolicy, *, weak: bool = False) -> int:
        """Row of a policy, or of the weak pass of its contrast."""
        key = (policy, weak)
        row = self._row_of.get(key)
        if row is None:
            controls = LayerControls.of(policy, self._shape, self._super_experts, weak=weak)
            row = next((r for r, users in enumerate(self._users) if users == 0), len(self._rows))
            if row == len(self._rows):
                self._rows.append(controls)
                self._users.append(0)
                self.active = np.concatenate([self.active, controls.active[np.newaxis]])
            self._rows[row], self.active[row] = controls, controls.active
            self._row_of[key] = row
            self._layers = None
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        self._users[row] -= 1
        if self._users[row] == 0:
            self._row_of = {key: r for key, r in self._row_of.items() if r != row}

    def layer(self, place: int) -> PolicyTable:
        """All rows' controls in one layer. `place`: among the layers with experts."""
        if self._layers is None:
            self._layers = _packed(self._rows, len(self._shape.layers), self._device)
        return self._layers[place]

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
    return [PolicyTable(*(part[place] for part in parts)) for place in range(layers)]
