"""How long a call takes, on a CPU and on a GPU, and what is said of times taken several times.

Calls that are compared are timed in turns (`interleaved`), so that a ratio of two times is one of
the same moment (`Sample.over`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sluice.kernels.bench.cases.case import Call

_BATCH_SECONDS = 2e-3
_MOST_CALLS = 500
_WARM_UPS = 3
_FLUSH_BYTES = 2**30


class Clock(Protocol):
    """Times calls on one device."""

    def calls(self, call: Call, /) -> int:
        """How many calls in a row one time is to be taken of; `call` has run before."""

    def seconds(self, call: Call, calls: int) -> float:
        """Time of one of `calls` calls in a row."""


class CpuClock:
    """Times enough calls in a row that the clock's own cost and resolution do not count."""

    def calls(self, call: Call, /) -> int:
        """As many as make 2 ms."""
        return max(1, min(_MOST_CALLS, int(_BATCH_SECONDS / self.seconds(call, 1))))

    def seconds(self, call: Call, calls: int) -> float:
        """Their mean."""
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls


class CudaClock:
    """Times one call by the GPU's own clock, with nothing of its inputs in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        """Take the memory that is written between calls."""
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def calls(self, _call: Call, /) -> int:
        """One: a second would find its inputs in the cache."""
        return 1

    def seconds(self, call: Call, calls: int) -> float:
        """From before the first kernel to after the last."""
        event: Any = torch.cuda.Event
        began, ended = event(enable_timing=True), event(enable_timing=True)
        # Larger than any cache, and long enough that the launches behind it are all queued when
        # it ends: what is timed is the GPU's work.
        self._flush.zero_()
        self._flush.zero_()
        began.record()
        for _ in range(calls):
            call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3 / calls


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleaved(calls: Mapping[str, Call], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Times of calls, taken in turns so that a slow moment falls on all of them.

    Args:
        calls: by name.
        repeats: times of each.
        clock: of their device.

    Returns:
        Seconds of each repeat, by name.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(_WARM_UPS):
            call()
        counts[name] = clock.calls(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for repeat in range(repeats):
        for name in order[:: -1 if repeat % 2 else 1]:
            times[name].append(clock.seconds(calls[name], counts[name]))
    return times


@dataclass(frozen=True, slots=True)
class Sample:
    """One number a repeat.

    Attributes:
        values: in the order of the repeats; at least two.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their middle."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        tenths = statistics.quantiles(self.values, n=10, method="inclusive")
        return tenths[0], tenths[-1]

    def over(self, other: Sample) -> Sample:
        """The ratio of each repeat, of which both have as many."""
        pairs = zip(self.values, other.values, strict=True)
        return Sample(tuple(one / two for one, two in pairs))
