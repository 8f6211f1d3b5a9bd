"""Memory of the server's processes while it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import psutil

_MEBIBYTE = 2**20
_EVERY = 1.0


class ServerNotFoundError(Exception):
    """No process of this machine listens where the server is said to be."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth of memory.

    Attributes:
        mb_per_1000: mebibytes per 1,000 ended requests, by least squares.
        error: its standard error, of independent deviations.
        requests: ended within the time looked at.
    """

    mb_per_1000: float
    error: float
    requests: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident mebibytes of all processes of a server: Unix seconds and values."""

    times: tuple[float, ...]
    values: tuple[float, ...]

    def slope(self, ends: Sequence[float], after: float) -> Slope | None:
        """Growth from `after` on, over requests that ended at `ends`; None if nothing varies."""
        times = np.array(self.times)
        kept = times >= after
        done = np.searchsorted(np.sort(np.array(ends)), times[kept], side="right") / 1000
        values = np.array(self.values)[kept]
        if len(done) < 3 or done[0] == done[-1]:
            return None
        spread = done - done.mean()
        slope = float(spread @ values / (spread @ spread))
        rest = values - values.mean() - slope * spread
        error = float(np.sqrt(rest @ rest / (len(done) - 2) / (spread @ spread)))
        return Slope(slope, error, round(1000 * (done[-1] - done[0])))


class MemoryWatch:
    """Samples the memory of the server behind a URL, and of the processes it started."""

    def __init__(self, url: str) -> None:
        self._server = _listener(url)
        self._samples: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Sample until cancelled, or until the server is gone."""
        while self._server.is_running():
            # Reading all of /proc must not delay the clients, nor the scrape that is being timed.
            self._samples.append((time.time(), await asyncio.to_thread(self._resident)))
            await asyncio.sleep(_EVERY)

    @property
    def memory(self) -> Memory:
        """What was sampled so far."""
        times, values = zip(*self._samples, strict=True) if self._samples else ((), ())
        return Memory(times, values)

    def _resident(self) -> float:
        total = 0
        for process in [self._server, *self._server.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total / _MEBIBYTE


def _listener(url: str) -> psutil.Process:
    """The first process of those that listen at the URL's port.

    Raises:
        ServerNotFoundError: none does, or it belongs to somebody else.
    """
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    listening = {
        each.pid
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) and each.pid is not None
    }
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or not listening:
        raise ServerNotFoundError(
            f"{url}: no process of this machine to watch the memory of; memory: false goes without"
        )
    processes = [psutil.Process(pid) for pid in listening]
    # API processes that share a port are children of one.
    return next((each for each in processes if each.ppid() not in listening), processes[0])
