"""What engines tell a process that serves their answers: counters, and sums of ended requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.engine_counters import EngineCounters
from sluice.models.telemetry.request_sums import RequestSums

_MAX_RECORDS = 16_384


@dataclass(slots=True)
class _Expected:
    """Sums of one request key.

    Attributes:
        running: engine requests that have it and have not ended.
        sums: of those that have.
        complete: set when none runs, if somebody waits.
    """

    running: set[str] = field(default_factory=set)
    sums: RequestSums | None = None
    complete: asyncio.Event | None = None

    def settle(self) -> None:
        if self.complete is not None and not self.running:
            self.complete.set()

    def give_up(self) -> None:
        self.running.clear()
        self.settle()


class Inbox:
    """Keeps what has arrived; one instance per engine client.

    Attributes:
        engines: counters by vLLM's index of the engine.
    """

    def __init__(self) -> None:
        self.engines: dict[int, EngineCounters] = {}
        self._expected: OrderedDict[str, _Expected] = OrderedDict()
        self._keys: dict[str, str] = {}
        self._engine_died = False

    def expect(self, request_id: str, request_key: str) -> None:
        """Learn of a request that goes to an engine.

        Args:
            request_id: the engine's.
            request_key: of the client's request; its samples share it.
        """
        expected = self._expected.get(request_key)
        if expected is None:
            # Not every caller of an engine in this process takes what it ran.
            while len(self._expected) >= _MAX_RECORDS:
                self._expected.popitem(last=False)[1].give_up()
            expected = self._expected[request_key] = _Expected()
        expected.running.add(request_id)
        self._keys[request_id] = request_key

    def arrive(self, request_id: str, wire: Mapping[str, Any] | None) -> None:
        """Take what an ended request ran.

        Args:
            request_id: the engine's.
            wire: `RequestSums.to_wire`, or None if it reached no step.
        """
        expected = self._expected.get(self._keys.pop(request_id, ""))
        if expected is None:
            return
        expected.running.discard(request_id)
        if wire is not None:
            sums = RequestSums.from_wire(wire)
            if expected.sums is None:
                expected.sums = sums
            else:
                expected.sums.add(sums)
        expected.settle()

    def count(self, engine: int, counts: Counts, *, new_window: bool) -> None:
        """Add what an engine has counted."""
        if engine not in self.engines:
            self.engines[engine] = EngineCounters(counts - counts)
        self.engines[engine].add(counts, new_window=new_window)

    def fail(self) -> None:
        """The engine has died: nothing more arrives."""
        self._engine_died = True
        for expected in self._expected.values():
            expected.give_up()

    def take(self, request_key: str) -> RequestSums | None:
        """Hand out what has arrived of a client's request and forget it; None if nothing has."""
        expected = self._expected.pop(request_key, None)
        return None if expected is None else expected.sums

    async def wait(self, request_key: str) -> None:
        """Wait until all of a client's request has ended in the engine, and its sums are here."""
        expected = self._expected.get(request_key)
        if expected is None or not expected.running or self._engine_died:
            return
        if expected.complete is None:
            expected.complete = asyncio.Event()
        await expected.complete.wait()

    def complete(self, request_key: str) -> bool:
        """Whether nothing more will arrive of a client's request."""
        expected = self._expected.get(request_key)
        return expected is None or not expected.running
