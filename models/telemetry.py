"""What ran: counters in a memory-mapped file, and one record per request that has a policy.

The worker adds integers that its step plan already knows, so counting never touches the device.
The HTTP edge maps the same file read-only: a scrape reads memory and never waits for the engine.
A record is handed out once, after its request has ended.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip import ATTENTION, MODULES
from sluice.models.plan import EXECUTED, FILLED, OUTCOMES

TELEMETRY_ENV = "SLUICE_TELEMETRY_DIR"
"""Folder of the counter files. An environment variable, because every process vLLM starts inherits
it, and because vLLM's `additional_config` is part of its compile cache's key."""

WINDOW_SECONDS = 10.0
_MAX_RECORDS = 16_384
_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2

IntArray = NDArray[np.int64]


def telemetry_folder() -> Path | None:
    """Folder of the counter files, or None where `sluice serve` did not start this process."""
    folder = os.environ.get(TELEMETRY_ENV)
    return Path(folder) if folder else None


class LayerCounters:
    """Token rows per layer, module and outcome; one writer, any number of readers.

    The file holds int64 of shape (3, layers, 2 modules, 3 outcomes): the total since start, the
    last whole window of work and the window now being filled. A window is counted in steps' time,
    so an idle server keeps showing the last work it did.
    """

    def __init__(self, array: NDArray[np.int64]) -> None:
        self._array = array
        self._window_ends = 0.0

    @classmethod
    def create(cls, path: Path, num_layers: int) -> Self:
        """Make the file, zeroed. An engine that restarts starts from zero, as counters may."""
        shape = (3, num_layers, len(MODULES), len(OUTCOMES))
        partial = path.with_suffix(".partial")
        np.memmap(partial, dtype=np.int64, mode="w+", shape=shape).flush()
        partial.replace(path)
        return cls(np.memmap(path, dtype=np.int64, mode="r+", shape=shape))

    @classmethod
    def in_memory(cls, num_layers: int) -> Self:
        """Counters that nobody else reads."""
        return cls(np.zeros((3, num_layers, len(MODULES), len(OUTCOMES)), dtype=np.int64))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map an existing file read-only."""
        flat = np.memmap(path, dtype=np.int64, mode="r")
        return cls(flat.reshape(3, -1, len(MODULES), len(OUTCOMES)))

    def add(self, counts: IntArray) -> None:
        """Add one step. `counts`: int64, broadcastable to (layers, 2 modules, 3 outcomes)."""
        now = time.monotonic()
        if now >= self._window_ends:
            self._array[_PREVIOUS] = self._array[_CURRENT]
            self._array[_CURRENT] = 0
            self._window_ends = now + WINDOW_SECONDS
        self._array[_TOTAL] += counts
        self._array[_CURRENT] += counts

    @property
    def totals(self) -> IntArray:
        """Copy of the totals, shape (layers, 2 modules, 3 outcomes)."""
        return np.array(self._array[_TOTAL])

    @property
    def window(self) -> IntArray:
        """Copy of the last one to two windows, shape (layers, 2 modules, 3 outcomes)."""
        return np.array(self._array[_PREVIOUS] + self._array[_CURRENT])


def full_depth_counts(num_layers: int) -> IntArray:
    """Counts of one token that runs everything, shape (layers, 2 modules, 3 outcomes)."""
    counts = np.zeros((num_layers, len(MODULES), len(OUTCOMES)), dtype=np.int64)
    counts[..., EXECUTED] = 1
    return counts


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Parameters a token multiplies with, per layer; the unit of `compute_fraction`.

    Attributes:
        modules: float64, shape (layers, 2 modules).
        fill: float64, shape (layers,): what filling K/V costs instead of attention.
    """

    modules: NDArray[np.float64]
    fill: NDArray[np.float64]

    def fraction(self, counts: IntArray) -> float:
        """Share of full depth's parameter multiplications that ran, in [0, 1]; 1.0 for no tokens.

        Args:
            counts: shape (layers, 2 modules, 3 outcomes).
        """
        full = float((counts.sum(axis=-1) * self.modules).sum())
        ran = float((counts[..., EXECUTED] * self.modules).sum())
        ran += float((counts[:, ATTENTION, FILLED] * self.fill).sum())
        return ran / full if full else 1.0


class RequestRecords:
    """Counts of live and just-ended requests by record key; samples of one request share a key."""

    def __init__(self, num_layers: int) -> None:
        self._shape = (num_layers, len(MODULES), len(OUTCOMES))
        self._counts: OrderedDict[str, IntArray] = OrderedDict()

    def add(self, key: str, counts: IntArray) -> None:
        """Add one step's counts, shape (layers, 2 modules, 3 outcomes)."""
        record = self._counts.get(key)
        if record is None:
            # A client that vanished between its last token and the take leaves a record behind.
            while len(self._counts) >= _MAX_RECORDS:
                self._counts.popitem(last=False)
            record = self._counts[key] = np.zeros(self._shape, dtype=np.int64)
        record += counts

    def take(self, key: str) -> IntArray | None:
        """Hand a record out and forget it; None if the request never reached a step."""
        return self._counts.pop(key, None)
