"""The Pareto set, the presets chosen from it, and what is not shown of them; no model in sight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sluice.models.offline.intervals import SIGNIFICANCE
from sluice.models.profile.fields import FrontierPoint

ALLOWED_LOSS = {"quality": 0.005, "balanced": 0.01, "fast": 0.03}
"""Presets, and how far the quality of each may lie under full depth's, as measured. Half a point is
no loss: it is one item of two hundred."""

_ROUNDING = 1e-9


def on_frontier(measured: Sequence[tuple[float, float, float]]) -> list[bool]:
    """Which points no other beats: at least as good in all three, and better in one.

    Args:
        measured: quality and speed, the more the better, and compute, the less the better.
    """
    return [not any(_beats(other, own) for other in measured) for own in measured]


def choose(points: Sequence[FrontierPoint]) -> dict[str, str]:
    """The cheapest point that each preset allows, by preset.

    Allowed are points of the frontier whose quality, as measured, is at most `ALLOWED_LOSS` under
    full depth's, and that are shown to be faster than full depth (`FrontierPoint.faster`). The
    cheapest is the fastest of them. Those whose own speed lies within the
    fastest's interval tie with it: of those `quality` takes the best, and the others take the one
    with the least compute on all tokens, then the best. Where no setting is as good as that at a
    gain, or none is shown to be faster, full depth is the choice.

    Args:
        points: full depth first.
    """
    triples = [(p.quality.value, p.speed.value, p.compute_fraction) for p in points]
    best = [p for p, kept in zip(points, on_frontier(triples), strict=True) if kept]
    chosen = {}
    for preset, loss in ALLOWED_LOSS.items():
        least = points[0].quality.value - loss - _ROUNDING
        able = [p for p in best if p.quality.value >= least and _shown_faster(p)]
        ties = _fastest(able) if able else [points[0]]
        if preset == "quality":
            order = [(-p.quality.value, p.compute_fraction, -p.speed.value) for p in ties]
        else:
            order = [(p.compute_fraction, -p.quality.value, -p.speed.value) for p in ties]
        chosen[preset] = ties[order.index(min(order))].name
    return chosen


def shortfalls(points: Sequence[FrontierPoint], presets: Mapping[str, str]) -> Iterator[str]:
    """What measurements do not show of the presets that were chosen, in words.

    Args:
        points: full depth first.
        presets: names of points by preset.
    """
    full = points[0]
    by_name = {point.name: point for point in points}
    if not any(map(_shown_faster, points)):
        yield "no setting is shown to be faster than full depth, and every preset is full depth"
    for preset, name in presets.items():
        loss = ALLOWED_LOSS[preset]
        at_most = full.quality.value - by_name[name].quality.low
        if name != full.name and at_most > loss:
            yield (
                f"preset {preset!r} loses at most {100 * loss:g} points of quality as measured; "
                f"the items leave it open to lose {100 * at_most:.1f}"
            )


def _shown_faster(point: FrontierPoint) -> bool:
    return point.faster is not None and point.faster <= SIGNIFICANCE


def _fastest(allowed: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The fastest, and those that tie with it."""
    fastest = max(allowed, key=lambda point: point.speed.value)
    return [point for point in allowed if point.speed.value >= fastest.speed.low]


def _beats(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    as_good = one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2]
    return as_good and one != other
