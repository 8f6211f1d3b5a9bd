"""Depth masks of the live requests' tokens as rows of deduplicated arrays.

A batch holds many tokens and few distinct masks. Each distinct mask owns one row; a token carries
a row number. Row 0 is full depth and is never released.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip import DepthMask

FULL_DEPTH = 0

BoolArray = NDArray[np.bool_]


class MaskTable:
    """Reference-counted masks.

    Attributes:
        skip: bool, (rows, layers, 2 modules); True where a token does not run the module.
        fill: bool, (rows, layers); True where it writes the layer's K/V without attending.
    """

    def __init__(self, num_layers: int) -> None:
        full = DepthMask.full(num_layers)
        self._row_of: dict[bytes, int] = {full.key: FULL_DEPTH}
        self._key_of: list[bytes] = [full.key]
        self._users: list[int] = [1]
        self.skip: BoolArray = full.skip[np.newaxis].copy()
        self.fill: BoolArray = full.fill[np.newaxis].copy()

    def acquire(self, mask: DepthMask) -> int:
        """Row of `mask`, making one if no live request has an equal one."""
        row = self._row_of.get(mask.key)
        if row is None:
            row = self._free_row()
            self._row_of[mask.key], self._key_of[row] = row, mask.key
            self.skip[row], self.fill[row] = mask.skip, mask.fill
        if row != FULL_DEPTH:
            self._users[row] += 1
        return row

    def release(self, row: int) -> bool:
        """Give a row back; True if that was its last user and the row is free again."""
        if row == FULL_DEPTH:
            return False
        self._users[row] -= 1
        if self._users[row]:
            return False
        del self._row_of[self._key_of[row]]
        return True

    def mask(self, row: int) -> DepthMask:
        """The mask of a live row."""
        return DepthMask(self.skip[row].copy(), self.fill[row].copy())

    def _free_row(self) -> int:
        for row, users in enumerate(self._users):
            if users == 0:
                return row
        self._users.append(0)
        self._key_of.append(b"")
        self.skip = np.concatenate([self.skip, np.zeros_like(self.skip[:1])])
        self.fill = np.concatenate([self.fill, np.zeros_like(self.fill[:1])])
        return len(self._users) - 1
