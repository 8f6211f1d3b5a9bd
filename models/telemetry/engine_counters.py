"""What one engine has counted since the start and in a window of recent work.

Threads read while the one that talks to the engine adds: an addition replaces all of it at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.ledger import WINDOW_SECONDS


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine had counted at one moment.

    Attributes:
        total: since the start.
        window: in the last one to two windows. They are of work: an idle engine keeps its last.
        began: when the current window began, on this machine's monotonic clock.
    """

    total: Counts
    window: Counts
    began: float


@dataclass(frozen=True, slots=True)
class _Marks:
    """Totals, now and where the window before the current one, and the current one, began."""

    total: Counts
    previous: Counts
    current: Counts
    began: float


class EngineCounters:
    """One engine's counts; an engine that restarts goes on from them."""

    def __init__(self, zeros: Counts) -> None:
        self._marks = _Marks(zeros, zeros, zeros, 0.0)

    def add(self, counts: Counts, *, new_window: bool) -> None:
        """Add what the engine has counted since it last told.

        Args:
            counts: of that time.
            new_window: a window begins with them; the engine says so, for all API servers alike.
        """
        marks = self._marks
        previous, current, began = marks.previous, marks.current, marks.began
        if new_window:
            previous, current, began = current, marks.total, time.monotonic()
        self._marks = _Marks(marks.total + counts, previous, current, began)

    def read(self) -> Reading:
        """What there is now."""
        marks = self._marks
        return Reading(marks.total, marks.total - marks.previous, marks.began)


def at_work(readings: Iterable[Reading]) -> list[Reading]:
    """Those of the engines whose window is of the same time as the latest one's.

    An engine without work keeps its last window; beside one that works, it is out of date.
    """
    engines = [*readings]
    latest = max((engine.began for engine in engines), default=0.0)
    return [engine for engine in engines if engine.began > latest - 2 * WINDOW_SECONDS]
