"""When requests come: seconds from the start of a stage, by seed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sluice.loadtest.workload.fields import Bursts

Seconds = npt.NDArray[np.float64]


def arrival_times(
    process: Literal["constant", "poisson"],
    rate: float,
    duration: float,
    rng: np.random.Generator,
    bursts: Bursts | None = None,
) -> Seconds:
    """Arrivals in [0, duration), sorted.

    Args:
        process: equal gaps, or exponential ones.
        rate: requests per second outside of bursts.
        duration: seconds.
        rng: drawn from if the process is random.
        bursts: higher rates on top.
    """
    times, expected = _expected(rate, duration, bursts)
    total = expected[-1]
    if process == "constant":
        counts = np.arange(np.ceil(total - 1e-9))
    else:
        # Unit-rate arrivals, a good deal more than needed; what is beyond the end is cut off.
        gaps = rng.exponential(size=int(total + 10 * np.sqrt(total) + 20))
        counts = np.cumsum(gaps)
        counts = counts[counts < total]
    # Where the expected number of arrivals reaches each count.
    return np.interp(counts, expected, times)


def _expected(rate: float, duration: float, bursts: Bursts | None) -> tuple[Seconds, Seconds]:
    """Corners of the expected number of arrivals over time."""
    times, expected = [0.0], [0.0]

    def until(end: float, now: float) -> None:
        end = min(end, duration)
        if end > times[-1]:
            expected.append(expected[-1] + now * (end - times[-1]))
            times.append(end)

    if bursts is not None:
        start = 0.0
        while start < duration:
            until(start + bursts.every - bursts.seconds, rate)
            until(start + bursts.every, rate * bursts.factor)
            start += bursts.every
    until(duration, rate)
    return np.array(times), np.array(expected)
