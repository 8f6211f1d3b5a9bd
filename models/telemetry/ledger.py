"""Adds up what the workers of an engine tell, beside its scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sluice.models.policy.axes import EXECUTED, MODULES, BoolArray
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.request_sums import RequestSums
from sluice.models.telemetry.step_counts import (
    RequestStep,
    RoutedStepCounts,
    StockStep,
    WorkerCounts,
    count_outcomes,
)

FLUSH_SECONDS = 0.25
"""Longest time that counts of a working engine wait."""

WINDOW_SECONDS = 10.0
"""Gauges cover one to two windows of work."""


@dataclass(frozen=True, slots=True)
class Flush:
    """Counts that go to the API servers.

    Attributes:
        counts: since the last flush.
        new_window: a window of work begins with them.
    """

    counts: Counts
    new_window: bool


class Ledger:
    """Sums of one engine, and of its requests."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._nothing = Counts.zeros(num_layers)
        self._counts = self._nothing
        self._stock_rows = self._stock_generated = 0
        self._skip: BoolArray = np.zeros((0, num_layers, len(MODULES)), dtype=np.bool_)
        self._fill: BoolArray = np.zeros((0, num_layers), dtype=np.bool_)
        self._requests: dict[str, RequestSums] = {}
        self._flushed = self._window_ends = 0.0

    def add(self, told: WorkerCounts, runs: Callable[[str], bool]) -> None:
        """Add what a worker tells.

        Args:
            told: by the worker.
            runs: whether a request's sums will still be taken; what an engine has already begun
                for a request that has ended belongs to nobody.
        """
        for step in told.steps:
            if isinstance(step, StockStep):
                # Two numbers: most steps are these, and arrays are made once a flush.
                self._stock_rows += step.rows
                self._stock_generated += step.generated
            else:
                self._add_routed(step, runs)
        if told.selections is not None:
            nothing = self._nothing
            self._counts = self._counts + Counts(nothing.layers, nothing.exits, told.selections)

    def take(self, request_id: str) -> RequestSums | None:
        """Hand out the sums of a request that has ended; None if it reached no step."""
        return self._requests.pop(request_id, None)

    def flush(self, *, idle: bool) -> Flush | None:
        """Hand out the counts, if there are any and they have waited long enough.

        Args:
            idle: no request is left, so that no step may come for long.
        """
        now = time.monotonic()
        nothing = self._counts is self._nothing and not self._stock_rows
        if nothing or not (idle or now - self._flushed >= FLUSH_SECONDS):
            return None
        new_window = now >= self._window_ends
        if new_window:
            self._window_ends = now + WINDOW_SECONDS
        stock = Counts.zeros(self._num_layers)
        stock.layers[..., EXECUTED] = self._stock_rows
        stock.exits[-1] = self._stock_generated
        flush = Flush(self._counts + stock, new_window)
        self._counts, self._flushed = self._nothing, now
        self._stock_rows = self._stock_generated = 0
        return flush

    def _add_routed(self, step: RoutedStepCounts, runs: Callable[[str], bool]) -> None:
        for row, (skip, fill) in step.masks.items():
            self._set_mask(row, skip, fill)
        counts, exits = count_outcomes(step.segments, step.passes, self._skip, self._fill)
        none = self._nothing.selections
        self._counts = self._counts + Counts(counts.sum(axis=(0, 1)), exits.sum(axis=0), none)
        for request in step.requests:
            if not runs(request.request_id):
                continue
            sums = self._requests.get(request.request_id)
            if sums is None:
                sums = self._requests[request.request_id] = RequestSums.zeros(self._num_layers)
            sums.counts += counts[request.index]
            sums.exits += exits[request.index]
            _add_request(sums, request)

    def _set_mask(self, row: int, skip: BoolArray, fill: BoolArray) -> None:
        missing = row + 1 - len(self._skip)
        if missing > 0:
            more = max(missing, len(self._skip))
            self._skip = np.pad(self._skip, ((0, more), (0, 0), (0, 0)))
            self._fill = np.pad(self._fill, ((0, more), (0, 0)))
        self._skip[row], self._fill[row] = skip, fill


def _add_request(sums: RequestSums, step: RequestStep) -> None:
    if step.sampled is not None:
        sums.heads[step.sampled] += 1, step.heads
    if step.exit_layer is not None:
        sums.exit_layers.append(step.exit_layer)
    if step.token is not None:
        sums.add_token(*step.token)
    if step.skipped is not None:
        sums.skipped = step.skipped
    if step.experts is not None:
        sums.add_experts(step.experts)
