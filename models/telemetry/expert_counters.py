"""How often which expert was selected: counters in a memory-mapped file, one per engine.

On a CPU the router adds to the file's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from sluice.kernels.ops.router_config import EXTRA, MASKED, ROWS
from sluice.models.policy.axes import IntArray
from sluice.models.telemetry.counter_file import CounterFile

SUFFIX = ".experts"
"""Of the files' names, beside `engine-N.counts`."""

_LAYERS, _EXPERTS, _BEGAN, _HEADER = 0, 1, 2, 3
_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2


class ExpertCounters(CounterFile):
    """Selections per layer and expert.

    The file holds int64: the number of layers with experts and of experts, when the current window
    began, those layers' numbers, then (3, layers, experts + 2): the total since start, and what it
    was when the window before the current one, and the current one, began. The two extra columns
    are `ROWS` and `MASKED`.

    Attributes:
        layers: decoder layers that have routed experts, ascending.
        total: int64, (layers, experts + 2), where a writer adds.
    """

    def __init__(self, words: IntArray) -> None:
        layers, experts = int(words[_LAYERS]), int(words[_EXPERTS])
        self._began = words[_BEGAN:_HEADER]
        self.layers = tuple(words[_HEADER : _HEADER + layers].tolist())
        self._array = words[_HEADER + layers :].reshape(3, layers, experts + EXTRA)
        self.total = self._array[_TOTAL]

    @classmethod
    def create(cls, path: Path | None, layers: Sequence[int], experts: int) -> Self:
        """Make the file, or counters in memory that nobody else reads if `path` is None."""
        header = [len(layers), experts, 0, *layers]
        counts = 3 * len(layers) * (experts + EXTRA)
        return cls._open(path, np.array([*header, *[0] * counts], dtype=np.int64))

    def _continue(self, before: Self) -> None:
        if before.layers == self.layers:
            self._array[:] = before.total

    def roll(self) -> None:
        """Begin a new window if the current one is over; called once per step by the writer."""
        if self._window_is_over():
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = self.total

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
