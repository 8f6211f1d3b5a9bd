"""How many token rows ran which layer: counters in a memory-mapped file, one per engine.

The worker adds integers that its step plan already knows, so counting never touches the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from sluice.models.policy.axes import EXECUTED, MODULES, OUTCOMES, IntArray
from sluice.models.telemetry.counter_file import CounterFile

SUFFIX = ".counts"
"""Of the files' names."""

_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2
_WORDS_PER_LAYER = 3 * len(MODULES) * len(OUTCOMES) + 1


class LayerCounters(CounterFile):
    """Token rows per layer, module and outcome; one writer, any number of readers.

    The file holds int64: first (3, layers, 2 modules, 3 outcomes), the total since start, the last
    whole window of work and the window now being filled; then (layers,), generated rows by the
    last layer they ran; then when the current window began. A window is counted in steps' time, so
    an idle server keeps showing the last work it did.
    """

    def __init__(self, words: IntArray) -> None:
        num_layers = len(words) // _WORDS_PER_LAYER
        outcomes, self._exits, self._began = np.split(words, [len(words) - 1 - num_layers, -1])
        self._array = outcomes.reshape(3, num_layers, len(MODULES), len(OUTCOMES))

    @classmethod
    def create(cls, path: Path | None, num_layers: int) -> Self:
        """Make the file, or counters in memory that nobody else reads if `path` is None."""
        return cls._open(path, np.zeros(num_layers * _WORDS_PER_LAYER + 1, dtype=np.int64))

    def _continue(self, before: Self) -> None:
        self._array[_TOTAL] = before.totals
        self._exits[:] = before.exits

    def add(self, counts: IntArray, exits: IntArray) -> None:
        """Add one step.

        Args:
            counts: int64, broadcastable to (layers, 2 modules, 3 outcomes).
            exits: int64, (layers,).
        """
        if self._window_is_over():
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = 0
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
