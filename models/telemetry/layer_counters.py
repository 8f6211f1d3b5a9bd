"""What ran: counters in a memory-mapped file, and one record per request that has a policy.

The worker adds integers that its step plan already knows, so counting never touches the device.
The HTTP edge maps the same file read-only: a scrape reads memory and never waits for the engine.
A record is handed out once, after its request has ended.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

import numpy as np

from sluice.models.policy.axes import EXECUTED, MODULES, OUTCOMES, IntArray
from sluice.models.telemetry import counter_file
from sluice.models.telemetry.counter_file import NANOSECONDS, WINDOW_SECONDS

_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2
_WORDS_PER_LAYER = 3 * len(MODULES) * len(OUTCOMES) + 1


class LayerCounters:
    """Token rows per layer, module and outcome; one writer, any number of readers.

    The file holds int64: first (3, layers, 2 modules, 3 outcomes), the total since start, the last
    whole window of work and the window now being filled; then (layers,), generated rows by the
    last layer they ran; then when the current window began. A window is counted in steps' time, so
    an idle server keeps showing the last work it did.
    """

    def __init__(self, flat: IntArray) -> None:
        num_layers = len(flat) // _WORDS_PER_LAYER
        outcomes, self._exits, self._began = np.split(flat, [len(flat) - 1 - num_layers, -1])
        self._array = outcomes.reshape(3, num_layers, len(MODULES), len(OUTCOMES))
        self._window_ends = 0.0

    @classmethod
    def create(cls, path: Path, num_layers: int) -> Self:
        """Make the file. An engine that restarts goes on from its predecessor's totals.

        From zero, the sum over engines would fall, which Prometheus takes for a restart of them
        all: it would count the others' work again.
        """
        words = _zeros(num_layers)
        left = counter_file.left_behind(path, len(words))
        if left is not None:
            own, before = cls(words), cls(left)
            own._array[_TOTAL] = before.totals
            own._exits[:] = before.exits
        return cls(counter_file.create(path, words))

    @classmethod
    def in_memory(cls, num_layers: int) -> Self:
        """Counters that nobody else reads."""
        return cls(_zeros(num_layers))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map an existing file read-only."""
        return cls(counter_file.read(path))

    def add(self, counts: IntArray, exits: IntArray) -> None:
        """Add one step.

        Args:
            counts: int64, broadcastable to (layers, 2 modules, 3 outcomes).
            exits: int64, (layers,).
        """
        now = time.monotonic()
        if now >= self._window_ends:
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = 0
            self._began[0] = int(now * NANOSECONDS)
            self._window_ends = now + WINDOW_SECONDS
        self._array[_TOTAL] += counts
        self._array[_CURRENT] += counts
        self._exits += exits

    def add_full_depth(self, rows: int, generated: int) -> None:
        """Add a step that ran everything: `rows` token rows, `generated` of them generated."""
        num_layers = len(self._exits)
        counts = np.zeros((num_layers, len(MODULES), len(OUTCOMES)), dtype=np.int64)
        counts[..., EXECUTED] = rows
        exits = np.zeros(num_layers, dtype=np.int64)
        exits[-1] = generated
        self.add(counts, exits)

    @property
    def began(self) -> int:
        """When the current window began, in nanoseconds of the machine's monotonic clock."""
        return int(self._began[0])

    @property
    def exits(self) -> IntArray:
        """Copy of generated rows since start by the last layer they ran, (layers,)."""
        return np.array(self._exits)

    @property
    def totals(self) -> IntArray:
        """Copy of the totals, shape (layers, 2 modules, 3 outcomes)."""
        return np.array(self._array[_TOTAL])

    @property
    def window(self) -> IntArray:
        """Copy of the last one to two windows, shape (layers, 2 modules, 3 outcomes)."""
        return np.array(self._array[_PREVIOUS] + self._array[_CURRENT])


def _zeros(num_layers: int) -> IntArray:
    return np.zeros(num_layers * _WORDS_PER_LAYER + 1, dtype=np.int64)
