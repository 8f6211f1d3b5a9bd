"""What ran: counters in a memory-mapped file, and one record per request that has a policy.

The worker adds integers that its step plan already knows, so counting never touches the device.
The HTTP edge maps the same file read-only: a scrape reads memory and never waits for the engine.
A record is handed out once, after its request has ended.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from sluice.models import counter_file
from sluice.models.counter_file import NANOSECONDS, WINDOW_SECONDS, IntArray
from sluice.models.depth.skip import ATTENTION, MODULES, PHASES
from sluice.models.plan import EXECUTED, FILLED, OUTCOMES

if TYPE_CHECKING:
    from sluice.models.experts.record import ExpertRecord

TELEMETRY_ENV = "SLUICE_TELEMETRY_DIR"
"""Folder of the counter files. An environment variable, because every process vLLM starts inherits
it, and because vLLM's `additional_config` is part of its compile cache's key."""

_MAX_RECORDS = 16_384
_TOTAL, _PREVIOUS, _CURRENT = 0, 1, 2
_WORDS_PER_LAYER = 3 * len(MODULES) * len(OUTCOMES) + 1


def telemetry_folder() -> Path | None:
    """Folder of the counter files, or None where `sluice serve` did not start this process."""
    folder = os.environ.get(TELEMETRY_ENV)
    return Path(folder) if folder else None


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


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Parameters a token multiplies with, per layer; the unit of `compute_fraction`.

    Attributes:
        modules: float64, shape (layers, 2 modules).
        fill: float64, shape (layers,): what filling K/V costs instead of attention.
        expert: one routed expert; 0 for a dense model.
    """

    modules: NDArray[np.float64]
    fill: NDArray[np.float64]
    expert: float = 0.0

    def fraction(self, counts: IntArray, more: float = 0.0) -> float:
        """Share of full depth's parameter multiplications that ran; 1.0 for no tokens.

        Args:
            counts: shape (layers, 2 modules, 3 outcomes).
            more: multiplications beyond those of the counted rows with all their experts; less
                than 0 where experts did not run.
        """
        # Layer 0 names every row once: a pending row that runs on later counts again above it.
        rows = int(counts[0, ATTENTION].sum())
        full = rows * float(self.modules.sum())
        ran = float((counts[..., EXECUTED] * self.modules).sum())
        ran += float((counts[:, ATTENTION, FILLED] * self.fill).sum())
        ran += more
        return ran / full if full else 1.0


@dataclass(slots=True)
class RequestRecord:
    """What the tokens of one request ran; samples of one request share a record.

    Attributes:
        counts: int64, (2 phases, layers, 2 modules, 3 outcomes), token rows.
        exits: int64, (layers,), generated rows by the last layer they ran.
        exit_layers: layer after which each generated token under an exit rule left, in the order
            in which they ran.
        skipped: bool, (layers, 2 modules), the mask a prompt method decided on, or None.
        experts: what experts it ran, or None without expert controls.
    """

    counts: IntArray
    exits: IntArray
    exit_layers: list[int] = field(default_factory=list)
    skipped: NDArray[np.bool_] | None = None
    experts: ExpertRecord | None = None


class RequestRecords:
    """Records of live and just-ended requests by record key."""

    def __init__(self, num_layers: int) -> None:
        self._shape = (len(PHASES), num_layers, len(MODULES), len(OUTCOMES))
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def of(self, key: str) -> RequestRecord:
        """The record of a live request, made on first use."""
        record = self._records.get(key)
        if record is None:
            # A client that vanished between its last token and the take leaves a record behind.
            while len(self._records) >= _MAX_RECORDS:
                self._records.popitem(last=False)
            record = self._records[key] = RequestRecord(
                np.zeros(self._shape, dtype=np.int64), np.zeros(self._shape[1], dtype=np.int64)
            )
        return record

    def take(self, key: str) -> RequestRecord | None:
        """Hand a record out and forget it; None if the request never reached a step."""
        return self._records.pop(key, None)
