"""The text of `/metrics`, made ahead of whoever asks for it at a fixed pace.

Making it takes some 20 ms of Python, and several times that where engines fill the cores. That is
never done on the event loop that streams answers. A scraper comes every so many seconds: the text
for its next visit is made in a thread shortly before, and the answer comes from memory.
"""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, generate_latest

AHEAD_SECONDS = 0.5
"""How long before the next visit its text is made."""

MOST_SECONDS = 1.0
"""Age at which a text is no longer given out."""


class Exposition:
    """The text of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._text = b""
        self._made = self._visited = float("-inf")
        self._next: asyncio.TimerHandle | None = None
        self._making: asyncio.Task[bytes] | None = None

    async def text(self, *, fresh: bool = False) -> bytes:
        """The series, in Prometheus' format.

        Args:
            fresh: of this moment; else a little older if it was made ahead.
        """
        if fresh:
            return await asyncio.to_thread(generate_latest, self._registry)
        now = time.monotonic()
        pace, self._visited = now - self._visited, now
        text = self._text if now - self._made <= MOST_SECONDS else await self._make()
        self._make_ahead(pace)
        return text

    def _make_ahead(self, pace: float) -> None:
        """Have the text for a visit that comes when this one's pace goes on."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if AHEAD_SECONDS < pace < float("inf"):
            loop = asyncio.get_running_loop()
            self._next = loop.call_later(pace - AHEAD_SECONDS, self._start)

    def _start(self) -> None:
        self._making = asyncio.create_task(self._make())

    async def _make(self) -> bytes:
        began = time.monotonic()
        self._text = await asyncio.to_thread(generate_latest, self._registry)
        self._made = began
        return self._text
