"""Charts of a profile: bars by layer, maps of experts, and the frontier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sluice.models.offline.report.figures import GROUND, LINE, SERIES, SOFT, TEXT, Chart, styled
from sluice.models.offline.report.frontier import measured_on, percent, presets_by_point
from sluice.models.profile.frontier_fields import FrontierFields
from sluice.models.profile.values import Interval

FRONTIER_PNG = "frontier.png"
EQUAL_COMPUTE_PNG = "equal_compute.png"
_MARKERS = ("s", "^", "v", "D")
"""Of full depth and three presets."""
_CHOICES = {
    "chain": ("calibrated levels", "o", "-", SERIES[0]),
    "uniform": ("evenly spread", "s", "-", SERIES[1]),
    "random": ("random", "x", "none", SOFT),
}
"""Legend, marker, line and colour of each way of choosing what to leave out."""
_BLUES = LinearSegmentedColormap.from_list(
    # The grid stays visible where a number is zero.
    "blues",
    [to_rgba(SERIES[0], 0.04), to_rgba(SERIES[0], 1.0)],
)
_CELL = 0.19
_REACH = 0.5
"""How far an axis goes beyond its values for their intervals, over how far the values go."""
_MARGIN = 0.03
"""Room at each end of an axis, over its length."""
_MARKS: dict[str, dict[str, Any]] = {
    "super": {"marker": "s", "facecolors": "none", "edgecolors": SERIES[3], "s": 70, "lw": 1.8},
    "behaviour": {"marker": "o", "facecolors": SERIES[4], "edgecolors": GROUND, "s": 40, "lw": 0.8},
}


@styled
def layer_bars(title: str, series: Mapping[str, Sequence[float]]) -> Chart:
    """Bars side by side for each layer, a colour for each series."""
    layers = len(next(iter(series.values())))
    width = 0.8 / len(series)
    figure = Figure(figsize=(max(4.0, 0.7 + 0.08 * layers * (len(series) + 1)), 2.1))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    labels = {}
    for number, (name, values) in enumerate(series.items()):
        left = [layer - 0.4 + width * number for layer in range(layers)]
        bars = axes.bar(left, values, width, align="edge", color=SERIES[number], label=name)
        for layer, (bar, value) in enumerate(zip(bars, values, strict=True)):
            bar.set_gid(f"bar-{number}-{layer}")
            labels[f"bar-{number}-{layer}"] = [f"layer {layer}, {name}: {value:.4g}"]
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=len(series))
    description = "; ".join(_extremes(name, values) for name, values in series.items())
    return Chart(title, description, figure, labels)


def _extremes(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return (
        f"{name}: from {low:.4g} in layer {values.index(low)} "
        f"to {high:.4g} in layer {values.index(high)}"
    )


@styled
def expert_map(
    title: str,
    layers: Sequence[int],
    values: Sequence[Sequence[float]],
    marks: Mapping[str, Iterable[tuple[int, int]]],
) -> Chart:
    """A row a layer, a column an expert: the stronger the colour, the more.

    Args:
        title: what the numbers are.
        layers: of the rows.
        values: a row per entry of `layers`, a number an expert; none is negative.
        marks: (layer, expert) by kind, `super` or `behaviour`; those of other layers are not on
            the map.
    """
    experts = len(values[0])
    figure = Figure(
        figsize=(max(4.0, 0.6 + _CELL * experts), 0.9 + _CELL * len(layers)), layout="constrained"
    )
    axes = figure.subplots()
    highest = max(max(row) for row in values) or 1.0
    mesh = axes.pcolormesh(
        values, cmap=_BLUES, vmin=0.0, vmax=highest, edgecolors=GROUND, linewidth=1.0
    )
    mesh.set_gid("cells")
    by_cell = {
        (layer, expert): value
        for layer, row in zip(layers, values, strict=True)
        for expert, value in enumerate(row)
    }
    labels = {"cells": [f"{_expert(*cell)}: {value:.4g}" for cell, value in by_cell.items()]}
    for kind, pairs in marks.items():
        shown = [pair for pair in pairs if pair in by_cell]
        if shown:
            x = [expert + 0.5 for _, expert in shown]
            y = [layers.index(layer) + 0.5 for layer, _ in shown]
            axes.scatter(x, y, gid=kind, label=f"{kind} expert", **_MARKS[kind])
            labels[kind] = [f"{_expert(*pair)}: {kind} expert" for pair in shown]
    axes.set(aspect="equal", anchor="W", xlabel="expert", ylabel="layer")
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(layers))], [str(layer) for layer in layers])
    columns = range(0, experts, -(-experts // 32))
    axes.set_xticks([column + 0.5 for column in columns], [str(column) for column in columns])
    if len(labels) > 1:
        figure.legend(loc="outside upper left", ncols=2)
    most, least = max(by_cell, key=by_cell.__getitem__), min(by_cell, key=by_cell.__getitem__)
    description = (
        f"{len(layers)} layers of {experts} experts; the most is {by_cell[most]:.4g} "
        f"({_expert(*most)}), the least {by_cell[least]:.4g} ({_expert(*least)}). "
        "All numbers are in the table below."
    )
    return Chart(title, description, figure, labels)


def _expert(layer: int, expert: int) -> str:
    return f"layer {layer}, expert {expert}"


@styled
def frontier_chart(fields: FrontierFields) -> Chart:
    """Quality over speed; colours are compute on generated tokens."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    points = fields.points
    speed, quality = [point.speed for point in points], [point.quality for point in points]
    x, y = [each.value for each in speed], [100 * each.value for each in quality]
    left, right = _limits(x, speed)
    beyond = _interval_lines(axes, x, y, speed, quality, (left, right))
    axes.set_xlim(left, right)
    dots = axes.scatter(
        x,
        y,
        c=[100 * point.generated_fraction for point in points],
        edgecolors=[TEXT if point.on_frontier else GROUND for point in points],
        # More colours would be embedded as a bitmap in the colour bar.
        cmap=colormaps["viridis"].resampled(12),
        zorder=2,
        gid="points",
    )
    figure.colorbar(dots, ax=axes, label="compute on generated tokens, % of full depth's")
    # In a legend: the presets lie so close together that labels beside them would overlap.
    presets = {points[0].name: [], **presets_by_point(fields)}
    marked = [point for point in points if point.name in presets]
    for marker, point in zip(_MARKERS, marked, strict=False):
        names = ": ".join(filter(None, (", ".join(presets[point.name]), point.name)))
        axes.plot(
            point.speed.value,
            100 * point.quality.value,
            marker,
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=SERIES[3],
            # A longer one would not fit; the table has all of it.
            label=shorten(names, 60, placeholder="..."),
        )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.axvline(1.0, color=SOFT, linewidth=1)
    axes.set_xlabel("generated tokens per second over full depth's")
    axes.set_ylabel(f"{fields.measure}, %")
    best = sum(point.on_frontier for point in points)
    description = (
        f"{len(points)} settings, {best} of them on the frontier, ringed; "
        "the table below has all numbers."
        + (f" {beyond} intervals of speed reach beyond the chart." if beyond else "")
    )
    labels = [
        f"{point.name}: {fields.measure} {percent(point.quality)}, "
        f"speed {point.speed.value:.2f}, compute {100 * point.compute_fraction:.1f} %"
        for point in points
    ]
    return Chart(f"{fields.measure} over speed", description, figure, {"points": labels})


@styled
def equal_compute_chart(fields: FrontierFields) -> Chart:
    """Quality over compute of the levels, of evenly spread units, and of random ones."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    labels = {}
    for name, (label, marker, line, colour) in _CHOICES.items():
        entries = [entry for entry in fields.equal_compute if entry.chosen == name]
        if not entries:
            continue
        x = [100 * entry.generated_fraction for entry in entries]
        quality = [entry.quality for entry in entries]
        y = [100 * each.value for each in quality]
        axes.errorbar(x, y, yerr=_errors(quality, 100), fmt="none", ecolor=colour, elinewidth=0.8)
        axes.plot(x, y, linestyle=line, color=colour)
        axes.scatter(x, y, marker=marker, color=colour, label=label, gid=name)
        labels[name] = [
            f"{name}, {entry.units} units: {percent(entry.quality)}" for entry in entries
        ]
    axes.invert_xaxis()
    axes.set_xlabel("compute on generated tokens, % of full depth's")
    axes.set_ylabel(f"{fields.measure}, %")
    axes.legend(loc="lower left")
    count = len(fields.equal_compute)
    description = f"{count} choices of what to leave out; the table below has all numbers."
    return Chart(f"{fields.measure} at equal compute", description, figure, labels)


def write_plots(fields: FrontierFields, folder: Path) -> tuple[Path, ...]:
    """Write `frontier.png`, and `equal_compute.png` if other choices were measured.

    Args:
        fields: of the profile.
        folder: that is there.

    Raises:
        OSError: a file cannot be written.
    """
    charts = {FRONTIER_PNG: frontier_chart(fields)}
    if fields.equal_compute:
        charts[EQUAL_COMPUTE_PNG] = equal_compute_chart(fields)
    for name, chart in charts.items():
        chart.figure.suptitle(f"{chart.title}: {measured_on(fields)}", fontsize=10)
        chart.figure.savefig(folder / name, dpi=120)
    return tuple(folder / name for name in charts)


def _limits(
    values: Sequence[float], intervals: Sequence[Interval], scale: float = 1.0
) -> tuple[float, float]:
    """Ends of an axis that shows all values, and of the intervals what lies near enough to them.

    One that is much wider than the values are apart would press these together.
    """
    reach = _REACH * (max(values) - min(values) or max(map(abs, values)) or 1.0)
    low = max(min(values) - reach, scale * min(each.low for each in intervals))
    high = min(max(values) + reach, scale * max(each.high for each in intervals))
    margin = _MARGIN * (high - low)
    return low - margin, high + margin


def _interval_lines(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    across: Sequence[Interval],
    upright: Sequence[Interval],
    limits: tuple[float, float],
) -> int:
    """Draw the intervals of points as far as the axis goes, with an arrow where they go on.

    Args:
        axes: to draw into.
        x: of the points.
        y: of the points.
        across: intervals of `x`.
        upright: intervals of `y`, which is in percent.
        limits: of the x axis.

    Returns:
        How many of `across` go on.
    """
    left, right = limits
    inside = [
        each.model_copy(update={"low": max(each.low, left), "high": min(each.high, right)})
        for each in across
    ]
    y_errors = _errors(upright, 100)
    axes.errorbar(x, y, y_errors, _errors(inside), fmt="none", ecolor=LINE, elinewidth=1, zorder=1)
    beyond = [n for n, each in enumerate(across) if each.low < left or each.high > right]
    for end, marker, cut in (
        (left, "<", [n for n in beyond if across[n].low < left]),
        (right, ">", [n for n in beyond if across[n].high > right]),
    ):
        arrows = [y[n] for n in cut]
        axes.plot([end] * len(arrows), arrows, marker, color=SOFT, markersize=4, clip_on=False)
    return len(beyond)


def _errors(intervals: Iterable[Interval], scale: float = 1.0) -> list[list[float]]:
    """Distances of the ends of intervals from their values, as matplotlib takes them."""
    ends = [(scale * (i.value - i.low), scale * (i.high - i.value)) for i in intervals]
    return [[low for low, _ in ends], [high for _, high in ends]]
