"""Expert controls of the live requests as rows of deduplicated tables.

As with depth masks (`sluice.models.mask_table`), a batch holds many tokens and few distinct
policies; a token carries a row number. Row 0 is vLLM's own choice and is never released.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.route_topk import RowControls
from sluice.models.expert_policy import STOCK_EXPERTS, ExpertId, ExpertPolicy
from sluice.models.expert_shape import ExpertShape
from sluice.models.experts.controls import LayerControls

STOCK_ROW = 0
_MAX_CACHED = 64

IntArray = NDArray[np.int64]


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
        self._cache: dict[tuple[bytes, int], RowControls] = {}
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
            self._cache.clear()
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        self._users[row] -= 1
        if self._users[row] == 0:
            self._row_of = {key: r for key, r in self._row_of.items() if r != row}

    def weak_ranks(self, rows: IntArray) -> IntArray:
        """Rank of the weak pass's expert by table row, -1 for others."""
        return np.array([self._rows[row].weak_rank for row in rows.tolist()], dtype=np.int64)

    def controls(self, rows: IntArray, layer: int) -> RowControls:
        """Controls of token rows in one layer.

        Args:
            rows: table rows, int64, (tokens,).
            layer: place among the layers with experts.
        """
        key = (rows.tobytes(), layer)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _MAX_CACHED * len(self._shape.layers):
                self._cache.clear()
            found = self._cache[key] = self._build(rows, layer)
        return found

    def _build(self, rows: IntArray, layer: int) -> RowControls:
        unique, inverse = np.unique(rows, return_inverse=True)
        used = [self._rows[row] for row in unique.tolist()]

        def gathered(name: str) -> torch.Tensor:
            stacked = np.stack([getattr(controls, name)[layer] for controls in used])
            # One distinct policy is broadcast over its rows.
            spread = stacked if len(used) == 1 else stacked[inverse]
            return torch.from_numpy(spread).to(self._device).view(len(spread), -1)

        def some(name: str, neutral: float) -> torch.Tensor | None:
            asked = any((getattr(c, name)[layer] != neutral).any() for c in used)
            return gathered(name) if asked else None

        forced = some("forced", False)
        most = [int(controls.k[layer]) for controls in used]
        return RowControls(
            k=gathered("k"),
            most=max(most),
            uniform=min(most) == max(most),
            bias=some("bias", 0.0),
            dropped=some("dropped", False),
            forced=forced,
            forced_weight=None if forced is None else gathered("forced_weight"),
            ratio=some("ratio", 0.0),
            top_p=some("top_p", np.inf),
            protected=some("protected", False),
        )
