"""Where measured points lie on a chart of two numbers, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sluice.models.offline.report.report_charts import BOTTOM, LEFT, RIGHT, Axis, Tick
from sluice.models.profile.fields import Interval

_LETTER, _LINE = 6.5, 13.0
"""A letter's width, roughly, and a line's height."""


@dataclass(frozen=True)
class Dot:
    """A measured point with its intervals, and what it says."""

    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    kind: str
    label: str


@dataclass(frozen=True)
class Name:
    """What is written beside a dot: where it begins, or ends if `anchor` is `end`."""

    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True)
class ScatterChart:
    """Points in two numbers, each with a 95 % interval."""

    title: str
    description: str
    width: float
    height: float
    top: float
    dots: tuple[Dot, ...]
    names: tuple[Name, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    x_title: str
    y_title: str

    @classmethod
    def of(
        cls,
        title: str,
        description: str,
        titles: tuple[str, str],
        points: Sequence[tuple[Interval, Interval, str, str, str]],
    ) -> ScatterChart:
        """A chart of points.

        Args:
            title: of the chart.
            description: in words, for those who do not see it.
            titles: of the axis to the right, and of that upwards.
            points: right, up, kind, label, and what is written beside it.
        """
        width, height, top = 560.0, 380.0, 32.0
        x = Axis.over(_ends(point[0] for point in points), LEFT, width - RIGHT)
        y = Axis.over(_ends(point[1] for point in points), height - BOTTOM, top)
        dots = tuple(
            Dot(
                *(x.at(right.value), y.at(up.value)),
                *(x.at(right.low), x.at(right.high), y.at(up.low), y.at(up.high)),
                kind,
                label,
            )
            for right, up, kind, label, _ in points
        )
        named = [(dot, point[4]) for dot, point in zip(dots, points, strict=True) if point[4]]
        names = _placed(named, width, top)
        return cls(title, description, width, height, top, dots, names, x.ticks, y.ticks, *titles)


def _placed(named: Sequence[tuple[Dot, str]], width: float, top: float) -> tuple[Name, ...]:
    """Names beside their dots, moved down until none lies on another; high ones first."""
    placed: list[tuple[float, float, float]] = []
    names = []
    for dot, text in sorted(named, key=lambda each: each[0].y):
        long = _LETTER * len(text)
        fits = dot.x + 9 + long < width
        left = dot.x + 9 if fits else dot.x - 9 - long
        y = max(dot.y - 8, top - 4)
        while any(abs(y - b) < _LINE and left < e and s < left + long for s, e, b in placed):
            y += _LINE
        placed.append((left, left + long, y))
        names.append(
            Name(round(left if fits else left + long, 2), y, "start" if fits else "end", text)
        )
    return tuple(names)


def _ends(intervals: Iterable[Interval]) -> list[float]:
    return [value for each in intervals for value in (each.low, each.value, each.high)]
