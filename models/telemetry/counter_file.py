"""Counter files: int64 in a memory map that one engine writes and any number of readers see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from sluice.models.policy.axes import IntArray

TELEMETRY_ENV = "SLUICE_TELEMETRY_DIR"
"""Folder of the counter files. An environment variable, because every process vLLM starts inherits
it, and because vLLM's `additional_config` is part of its compile cache's key."""


def telemetry_folder() -> Path | None:
    """Folder of the counter files, or None where `sluice serve` did not start this process."""
    folder = os.environ.get(TELEMETRY_ENV)
    return Path(folder) if folder else None


WINDOW_SECONDS = 10.0
NANOSECONDS = 1_000_000_000


def create(path: Path, words: IntArray) -> IntArray:
    """Put a file of these words in place, whole from the first moment, and map it for writing."""
    partial = path.with_suffix(".partial")
    made = np.memmap(partial, dtype=np.int64, mode="w+", shape=words.shape)
    made[:] = words
    made.flush()
    partial.replace(path)
    return np.memmap(path, dtype=np.int64, mode="r+", shape=words.shape)


def read(path: Path) -> IntArray:
    """Map an existing file read-only."""
    return np.memmap(path, dtype=np.int64, mode="r")


def left_behind(path: Path, size: int) -> IntArray | None:
    """Words that an engine of the same name left, or None if there are none of that size."""
    if not path.exists():
        return None
    words = np.fromfile(path, dtype=np.int64)
    return words if len(words) == size else None


class Windowed(Protocol):
    """Counters with a window of recent work."""

    @property
    def began(self) -> int:
        """When the current window began, in nanoseconds of the machine's monotonic clock."""


_Counters = TypeVar("_Counters", bound=Windowed)


def at_work(engines: Sequence[_Counters]) -> list[_Counters]:
    """Those of the engines whose window is of the same time as the latest one's.

    An engine without work keeps its last window; beside one that works, it is out of date.
    """
    latest = max(engine.began for engine in engines)
    return [e for e in engines if e.began > latest - 2 * WINDOW_SECONDS * NANOSECONDS]
