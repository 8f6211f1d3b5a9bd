"""Where things lie on the charts of a profile's page; the template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 12.0, 40.0
"""Room around the plot for ticks and their labels."""
_SHORTEST = 360.0
_HEIGHT = 200.0
_CELL = 18.0
_FAINTEST = 0.04
"""Opacity of a cell that is zero: the grid stays visible."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Values to places on the page, linearly.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: place of `low`.
        end: place of `high`.
        ticks: round numbers within.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[Tick, ...]

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> Axis:
        """An axis from round number to round number that holds all values."""
        held = list(values)
        low, high = min(held), max(held)
        if high - low < 1e-12:
            low, high = low - 0.5, high + 0.5
        step = _round_step((high - low) / 4)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        scale = (end - start) / ((last - first) * step)
        ticks = tuple(
            Tick(round(start + (n - first) * step * scale, 2), f"{n * step:.6g}")
            for n in range(first, last + 1)
        )
        return cls(first * step, last * step, start, end, ticks)

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Bar:
    """One bar: its corner and size, the series that it is of, and what it says."""

    x: float
    y: float
    width: float
    height: float
    series: int
    label: str


@dataclass(frozen=True)
class BarChart:
    """Bars side by side for each layer, from a line at zero."""

    title: str
    description: str
    width: float
    height: float
    zero: float
    bars: tuple[Bar, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]

    @classmethod
    def of(cls, title: str, series: Mapping[str, Sequence[float]]) -> BarChart:
        """A chart of numbers per layer, one series beside the other."""
        layers = len(next(iter(series.values())))
        group = max((_SHORTEST - LEFT - RIGHT) / layers, 8.0 * (len(series) + 1))
        width = LEFT + RIGHT + group * layers
        bottom = _HEIGHT - BOTTOM
        axis = Axis.over([0.0, *(v for each in series.values() for v in each)], bottom, TOP)
        zero, thick = axis.at(0.0), group / (len(series) + 1)
        bars = []
        for number, (name, values) in enumerate(series.items()):
            for layer, value in enumerate(values):
                x, place = LEFT + group * layer + thick * (number + 0.5), axis.at(value)
                bars.append(
                    Bar(
                        round(x, 2),
                        min(place, zero),
                        round(thick, 2),
                        round(abs(place - zero), 2),
                        number,
                        f"layer {layer}, {name}: {value:.4g}",
                    )
                )
        every = math.ceil(24.0 / group)
        x_ticks = tuple(
            Tick(round(LEFT + group * (layer + 0.5), 2), str(layer))
            for layer in range(0, layers, every)
        )
        said = "; ".join(_extremes(name, values) for name, values in series.items())
        return cls(title, said, width, _HEIGHT, zero, tuple(bars), x_ticks, axis.ticks)


def _extremes(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return (
        f"{name}: from {low:.4g} in layer {values.index(low)} "
        f"to {high:.4g} in layer {values.index(high)}"
    )


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: corner, opacity between 0 and 1, and what it says."""

    x: float
    y: float
    opacity: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A sign on a cell: its middle, and `super` or `behaviour`."""

    x: float
    y: float
    kind: str
    label: str


@dataclass(frozen=True)
class HeatMap:
    """A row a layer, a column an expert."""

    title: str
    description: str
    width: float
    height: float
    cell: float
    highest: float
    cells: tuple[Cell, ...]
    marks: tuple[Mark, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]

    @classmethod
    def of(
        cls,
        title: str,
        layers: Sequence[int],
        values: Sequence[Sequence[float]],
        marks: Mapping[str, Iterable[tuple[int, int]]],
    ) -> HeatMap:
        """A map of numbers that are not negative.

        Args:
            title: what they are.
            layers: of the rows.
            values: a row per entry of `layers`, a number an expert.
            marks: (layer, expert) by kind; those of other layers are not on the map.
        """
        experts = len(values[0])
        highest = max(max(row) for row in values)
        width, height = LEFT + RIGHT + _CELL * experts, TOP + BOTTOM + _CELL * len(layers)
        cells = tuple(
            Cell(
                LEFT + _CELL * expert,
                TOP + _CELL * row,
                round(max(value / highest if highest else 0.0, _FAINTEST), 3),
                f"layer {layer}, expert {expert}: {value:.4g}",
            )
            for row, (layer, numbers) in enumerate(zip(layers, values, strict=True))
            for expert, value in enumerate(numbers)
        )
        row_of = {layer: row for row, layer in enumerate(layers)}
        signs = tuple(
            Mark(
                LEFT + _CELL * (expert + 0.5),
                TOP + _CELL * (row_of[layer] + 0.5),
                kind,
                f"layer {layer}, expert {expert}: {kind} expert",
            )
            for kind, experts_of in marks.items()
            for layer, expert in experts_of
            if layer in row_of and expert < experts
        )
        where = [
            (value, layer, expert)
            for layer, numbers in zip(layers, values, strict=True)
            for expert, value in enumerate(numbers)
        ]
        most = max(where, key=lambda each: each[0])
        least = min(where, key=lambda each: each[0])
        said = (
            f"{len(layers)} layers of {experts} experts; the most is {most[0]:.4g} "
            f"(layer {most[1]}, expert {most[2]}), the least {least[0]:.4g} "
            f"(layer {least[1]}, expert {least[2]}). All numbers are in the table below."
        )
        every = math.ceil(experts / 32)
        return cls(
            title,
            said,
            max(width, _SHORTEST),
            height,
            _CELL,
            highest,
            cells,
            signs,
            tuple(Tick(TOP + _CELL * (r + 0.5), str(layer)) for r, layer in enumerate(layers)),
            tuple(Tick(LEFT + _CELL * (e + 0.5), str(e)) for e in range(0, experts, every)),
        )
