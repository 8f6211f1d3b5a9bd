"""How often which expert was selected: counters in a memory-mapped file, one per engine.

As in `sluice.models.telemetry.layer_counters`, one process writes and any number of them read
without asking it. On a CPU the router adds to the file's own memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from sluice.kernels.ops.routing_args import EXTRA, MASKED, ROWS
from sluice.models.policy.axes import IntArray
from sluice.models.telemetry import counter_file
from sluice.models.telemetry.counter_file import NANOSECONDS, WINDOW_SECONDS

SUFFIX = ".experts"
"""Of the files' names, beside `engine-N.counts`."""

_LAYERS, _EXPERTS, _BEGAN, _HEADER = 0, 1, 2, 3
_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2


class ExpertCounters:
    """Selections per layer and expert.

    The file holds int64: the number of layers with experts and of experts, when the current window
    began, those layers' numbers, then (3, layers, experts + 2): the total since start, and what it
    was when the window before the current one, and the current one, began. The two extra columns
    are `ROWS` and `MASKED`.

    Attributes:
        layers: decoder layers that have routed experts, ascending.
        total: int64, (layers, experts + 2), where a writer adds.
    """

    def __init__(self, flat: IntArray) -> None:
        layers, experts = int(flat[_LAYERS]), int(flat[_EXPERTS])
        self._began = flat[_BEGAN:_HEADER]
        self.layers = tuple(flat[_HEADER : _HEADER + layers].tolist())
        self._array = flat[_HEADER + layers :].reshape(3, layers, experts + EXTRA)
        self.total = self._array[_TOTAL]
        self._window_ends = 0.0

    @classmethod
    def create(cls, path: Path | None, layers: Sequence[int], experts: int) -> Self:
        """Make the file, or counters in memory that nobody else reads if `path` is None.

        An engine that restarts goes on from its predecessor's totals, as `LayerCounters` does.
        """
        words = np.zeros(
            _HEADER + len(layers) + 3 * len(layers) * (experts + EXTRA), dtype=np.int64
        )
        header = [len(layers), experts, 0, *layers]
        words[: len(header)] = header
        if path is None:
            return cls(words)
        left = counter_file.left_behind(path, len(words))
        if left is not None and (before := cls(left)).layers == tuple(layers):
            cls(words)._array[:] = before.total
        return cls(counter_file.create(path, words))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map an existing file read-only."""
        return cls(counter_file.read(path))

    def roll(self) -> None:
        """Begin a new window if the current one is over; called once per step by the writer."""
        now = time.monotonic()
        if now >= self._window_ends:
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = self.total
            self._began[0] = int(now * NANOSECONDS)
            self._window_ends = now + WINDOW_SECONDS

    @property
    def began(self) -> int:
        """When the current window began, in nanoseconds of the machine's monotonic clock."""
        return int(self._began[0])

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
