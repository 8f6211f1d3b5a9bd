"""Policies of the live requests as rows of one deduplicated array of masks.

A batch holds many requests and few distinct policies. Each distinct policy owns one row; a request
carries a row number. Row 0 is the stock policy and is never released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip import skip_masks
from sluice.models.policy import RoutingPolicy, SkipSet

STOCK_ROW = 0


class PolicyTable:
    """Reference-counted rows of skip masks.

    Attributes:
        masks: bool, shape (rows, 2 phases, layers, 2 modules); True where a token of that phase
            skips that module. Phases and modules are indexed as in `sluice.models.depth.skip`.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._row_of: dict[SkipSet, int] = {SkipSet(): STOCK_ROW}
        self._users: list[int] = [1]
        self._skip_of: list[SkipSet] = [SkipSet()]
        self.masks: NDArray[np.bool_] = skip_masks(SkipSet(), num_layers)[np.newaxis]

    def acquire(self, policy: RoutingPolicy) -> int:
        """Row of `policy`, making one if no live request has an equal depth control."""
        skip = policy.skip
        if skip.empty:
            return STOCK_ROW
        row = self._row_of.get(skip)
        if row is None:
            row = self._free_row()
            self._row_of[skip], self._skip_of[row] = row, skip
            self.masks[row] = skip_masks(skip, self._num_layers)
        self._users[row] += 1
        return row

    def release(self, row: int) -> bool:
        """Give a row back; True if that was its last request and the row is free again."""
        if row == STOCK_ROW:
            return False
        self._users[row] -= 1
        if self._users[row]:
            return False
        del self._row_of[self._skip_of[row]]
        return True

    def _free_row(self) -> int:
        for row, users in enumerate(self._users):
            if users == 0:
                return row
        self._users.append(0)
        self._skip_of.append(SkipSet())
        self.masks = np.concatenate([self.masks, np.zeros_like(self.masks[:1])])
        return len(self._users) - 1
