"""Confidence intervals, the Pareto set, and the presets chosen from it; no model in sight."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

from sluice.models.profile_fields import FrontierPoint, Interval

CONFIDENCE = 0.95
LEAST_REPEATS = 6
"""Fewer values than this give no 95 % interval of their median, however wide."""
ALLOWED_LOSS = {"quality": 0.005, "balanced": 0.01, "fast": 0.03}
"""Presets, and how far the quality of each may lie under full depth's, as measured. Half a point is
no loss: it is one item of two hundred."""
_ROUNDING = 1e-9


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


def on_frontier(measured: Sequence[tuple[float, float, float]]) -> list[bool]:
    """Which points no other beats: at least as good in all three, and better in one.

    Args:
        measured: quality and speed, the more the better, and compute, the less the better.
    """
    return [not any(_beats(other, own) for other in measured) for own in measured]


def choose(points: Sequence[FrontierPoint]) -> dict[str, str]:
    """The cheapest point that each preset allows, by preset.

    Allowed are points of the frontier whose quality, as measured, is at most `ALLOWED_LOSS` under
    full depth's. The cheapest is the fastest of them. Those whose own speed lies within the
    fastest's interval tie with it: of those `quality` takes the best, and the others take the one
    with the least compute on all tokens, then the best. Where no setting is as good as that at a
    gain, full depth is the choice.

    Args:
        points: full depth first.
    """
    triples = [(p.quality.value, p.speed.value, p.compute_fraction) for p in points]
    best = [p for p, kept in zip(points, on_frontier(triples), strict=True) if kept]
    chosen = {}
    for preset, loss in ALLOWED_LOSS.items():
        least = points[0].quality.value - loss - _ROUNDING
        ties = _fastest([p for p in best if p.quality.value >= least])
        if preset == "quality":
            order = [(-p.quality.value, p.compute_fraction, -p.speed.value) for p in ties]
        else:
            order = [(p.compute_fraction, -p.quality.value, -p.speed.value) for p in ties]
        chosen[preset] = ties[order.index(min(order))].name
    return chosen


def _fastest(allowed: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The fastest, and those that tie with it."""
    fastest = max(allowed, key=lambda point: point.speed.value)
    return [point for point in allowed if point.speed.value >= fastest.speed.low]


def _beats(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    as_good = one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2]
    return as_good and one != other
