"""How often which expert was selected: counters in a memory-mapped file, one per engine.

As in `sluice.models.telemetry`, one process writes and any number of them read without asking it.
On a CPU the router adds to the file's own memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sluice.kernels.route_columns import EXTRA, MASKED, ROWS
from sluice.models.telemetry import WINDOW_SECONDS

SUFFIX = ".experts"
"""Of the files' names, beside `engine-N.counts`."""

_HEADER = 2
_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2
IntArray = NDArray[np.int64]


class ExpertCounters:
    """Selections per layer and expert.

    The file holds int64: the number of layers with experts and of experts, those layers' numbers,
    then (3, layers, experts + 2): the total since start, and what it was when the window before
    the current one, and the current one, began. The two extra columns are `ROWS` and `MASKED`.

    Attributes:
        layers: decoder layers that have routed experts, ascending.
        total: int64, (layers, experts + 2), where a writer adds.
    """

    def __init__(self, flat: IntArray) -> None:
        layers, experts = (int(number) for number in flat[:_HEADER])
        self.layers = tuple(flat[_HEADER : _HEADER + layers].tolist())
        self._array = flat[_HEADER + layers :].reshape(3, layers, experts + EXTRA)
        self.total = self._array[_TOTAL]
        self._window_ends = 0.0

    @classmethod
    def create(cls, path: Path | None, layers: Sequence[int], experts: int) -> Self:
        """Make the file, zeroed, or counters in memory that nobody else reads if `path` is None."""
        size = _HEADER + len(layers) + 3 * len(layers) * (experts + EXTRA)
        if path is None:
            flat = np.zeros(size, dtype=np.int64)
            flat[: _HEADER + len(layers)] = [len(layers), experts, *layers]
        else:
            partial = path.with_suffix(".partial")
            made = np.memmap(partial, dtype=np.int64, mode="w+", shape=(size,))
            made[: _HEADER + len(layers)] = [len(layers), experts, *layers]
            made.flush()
            partial.replace(path)
            flat = np.memmap(path, dtype=np.int64, mode="r+", shape=(size,))
        return cls(flat)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map an existing file read-only."""
        return cls(np.memmap(path, dtype=np.int64, mode="r"))

    def roll(self) -> None:
        """Begin a new window if the current one is over; called once per step by the writer."""
        now = time.monotonic()
        if now >= self._window_ends:
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = self.total
            self._window_ends = now + WINDOW_SECONDS

    @property
    def selections(self) -> IntArray:
        """Copy of the selections since start, (layers, experts)."""
        return np.array(self.total[:, :-EXTRA])

    @property
    def masked(self) -> IntArray:
        """Copy of the selections that policies took away since start, (layers,)."""
        return np.array(self.total[:, MASKED])

    @property
    def window(self) -> IntArray:
        """Selections of the last one to two windows, (layers, experts)."""
        return np.array((self.total - self._array[_PREVIOUS])[:, :-EXTRA])

    @property
    def window_rows(self) -> IntArray:
        """Token rows routed in the last one to two windows, (layers,)."""
        return np.array((self.total - self._array[_PREVIOUS])[:, ROWS])
