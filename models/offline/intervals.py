"""Confidence intervals and how many repeats they need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

from sluice.models.profile.fields import Interval

CONFIDENCE = 0.95
LEAST_REPEATS = 6
"""Fewer values than this give no 95 % interval of their median, however wide."""


def share_interval(value: float, items: int) -> Interval:
    """Wilson's score interval of a share.

    It holds for the mean of numbers between 0 and 1 as well, where it is too wide rather than too
    narrow: of all such numbers with one mean, zeros and ones vary most.

    Args:
        value: share of the items, or mean over them, in [0, 1].
        items: how many.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    spread = z / (1 + z * z / items)
    spread *= math.sqrt(value * (1 - value) / items + z * z / (4 * items * items))
    middle = (value + z * z / (2 * items)) / (1 + z * z / items)
    # At 0 and 1 the interval ends there, and rounding must not push the value out of it.
    low, high = min(middle - spread, value), max(middle + spread, value)
    return Interval(value=value, low=max(low, 0.0), high=min(high, 1.0))


def median_interval(values: Sequence[float]) -> Interval:
    """Median, and the interval between two order statistics that holds it whatever the noise is.

    The median lies under the k-th smallest of n values where fewer than k fall under it, which has
    the probability of fewer than k heads in n tosses; the innermost such pair of values is taken
    whose two tails are within 5 % together. Of 6 to 8 values it is the smallest and the largest.

    Raises:
        ValueError: there are fewer than `LEAST_REPEATS` values.
    """
    if len(values) < LEAST_REPEATS:
        raise ValueError(f"{len(values)} values give no 95 % interval: {LEAST_REPEATS} are needed")
    ordered = sorted(values)
    tail, k = 0.0, 0
    while True:
        tail += math.comb(len(values), k) / 2 ** len(values)
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    return Interval(value=statistics.median(ordered), low=ordered[k - 1], high=ordered[-k])
