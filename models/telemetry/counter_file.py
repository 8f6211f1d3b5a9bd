"""Counter files: int64 in a memory map that one engine writes and any number of readers see.

A scrape reads memory and never waits for the engine.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from sluice.models.policy.axes import IntArray

TELEMETRY_ENV = "SLUICE_TELEMETRY_DIR"
"""Folder of the counter files. An environment variable, because every process vLLM starts inherits
it, and because vLLM's `additional_config` is part of its compile cache's key."""

WINDOW_SECONDS = 10.0
NANOSECONDS = 1_000_000_000


def telemetry_folder() -> Path | None:
    """Folder of the counter files, or None where `sluice serve` did not start this process."""
    folder = os.environ.get(TELEMETRY_ENV)
    return Path(folder) if folder else None


class CounterFile(ABC):
    """Counts since the start, and counts of a window of recent work.

    A subclass says in `__init__` where in the file's words its counts are.
    """

    _began: IntArray
    """Of the current window, (1,); see `began`."""
    _window_ends = 0.0

    @abstractmethod
    def __init__(self, words: IntArray) -> None:
        """Count in `words`, int64."""

    @abstractmethod
    def _continue(self, before: Self) -> None:
        """Go on from the totals of `before`, if it counted the same things."""

    @classmethod
    def _open(cls, path: Path | None, words: IntArray) -> Self:
        """Put a file of these words in place and map it; with no path, count in memory.

        An engine that restarts goes on from its predecessor's totals. From zero, the sum over
        engines would fall, which Prometheus takes for a restart of them all: it would count the
        others' work again.
        """
        counters = cls(words)
        if path is None:
            return counters
        if path.exists():
            left = np.fromfile(path, dtype=np.int64)
            if len(left) == len(words):
                counters._continue(cls(left))
        # Renamed into place, so that a reader finds the whole file or none.
        partial = path.with_suffix(".partial")
        made = np.memmap(partial, dtype=np.int64, mode="w+", shape=words.shape)
        made[:] = words
        made.flush()
        partial.replace(path)
        return cls(np.memmap(path, dtype=np.int64, mode="r+", shape=words.shape))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map an existing file read-only."""
        return cls(np.memmap(path, dtype=np.int64, mode="r"))

    @property
    def began(self) -> int:
        """When the current window began, in nanoseconds of the machine's monotonic clock."""
        return int(self._began[0])

    def _window_is_over(self) -> bool:
        """Whether the current window has ended; then a new one begins."""
        now = time.monotonic()
        if now < self._window_ends:
            return False
        self._began[0] = int(now * NANOSECONDS)
        self._window_ends = now + WINDOW_SECONDS
        return True


_Counters = TypeVar("_Counters", bound=CounterFile)


def at_work(engines: Sequence[_Counters]) -> list[_Counters]:
    """Those of the engines whose window is of the same time as the latest one's.

    An engine without work keeps its last window; beside one that works, it is out of date.
    """
    latest = max(engine.began for engine in engines)
    return [e for e in engines if e.began > latest - 2 * WINDOW_SECONDS * NANOSECONDS]
