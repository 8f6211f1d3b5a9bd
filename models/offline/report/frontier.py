"""A profile's frontier for people: a table, and two plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.models.profile.fields import EqualCompute, FrontierFields, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

FRONTIER_PNG = "frontier.png"
EQUAL_COMPUTE_PNG = "equal_compute.png"
TABLE_WIDTH = 140
"""Columns of a console that show the table whole."""
_MARKERS = ("s", "^", "v", "D")
"""Of full depth and three presets."""
_COLOURS = {"chain": "#1f5a99", "uniform": "#c07020", "random": "#888888"}


def write_plots(fields: FrontierFields, folder: Path) -> tuple[Path, ...]:
    """Write `frontier.png`, and `equal_compute.png` if other choices were measured.

    Args:
        fields: of the profile.
        folder: that is there.

    Raises:
        OSError: a file cannot be written.
    """
    drawn = [(FRONTIER_PNG, frontier_figure(fields))]
    if fields.equal_compute:
        drawn.append((EQUAL_COMPUTE_PNG, equal_compute_figure(fields)))
    for name, figure in drawn:
        figure.savefig(folder / name, dpi=120)
    return tuple(folder / name for name, _ in drawn)


def frontier_table(fields: FrontierFields) -> Table:
    """Every point, the fastest last; those of the frontier are marked."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=f"{_setting(fields)}; 95 % intervals", caption=preset_lines(fields))
    out.add_column("setting", overflow="fold")
    for heading in (
        fields.measure,
        "speed over\nfull depth",
        "compute,\ngenerated",
        "compute,\nall tokens",
        "on the\nfrontier",
        "preset",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    presets = _presets_by_point(fields)
    for point in sorted(fields.points, key=lambda point: point.speed.value):
        out.add_row(
            escape(point.name),
            _percent(point.quality),
            f"{point.speed.value:.2f} ({point.speed.low:.2f}-{point.speed.high:.2f})",
            f"{point.generated_fraction:.1%}",
            f"{point.compute_fraction:.1%}",
            "yes" if point.on_frontier else "",
            " ".join(presets.get(point.name, ())),
        )
    return out


def preset_lines(fields: FrontierFields) -> str:
    """What each preset is, a line each; says so where only full depth was good enough."""
    full, by_name = fields.points[0], {point.name: point for point in fields.points}
    lines = []
    for preset, name in fields.presets.items():
        point = by_name[name]
        points = 100 * (point.quality.value - full.quality.value)
        gain = f"{point.speed.value:.2f} times full depth's speed, {points:+.1f} points"
        if point == full:
            gain = "as nothing else that loses so little gains anything"
        lines.append(f"{preset}: {name}, {gain}")
    return "\n".join(lines)


def frontier_figure(fields: FrontierFields) -> Figure:
    """Quality over speed; colours are compute on generated tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    points = fields.points
    speed, quality = [p.speed for p in points], [p.quality for p in points]
    axes.errorbar(
        [each.value for each in speed],
        [100 * each.value for each in quality],
        xerr=_errors(speed),
        yerr=_errors(quality, 100),
        fmt="none",
        ecolor="#cccccc",
        elinewidth=1,
        zorder=1,
    )
    dots = axes.scatter(
        [each.value for each in speed],
        [100 * each.value for each in quality],
        c=[100 * point.generated_fraction for point in points],
        edgecolors=["black" if point.on_frontier else "none" for point in points],
        cmap="viridis",
        zorder=2,
    )
    figure.colorbar(dots, ax=axes, label="compute on generated tokens, % of full depth's")
    # In a legend: the presets lie so close together that labels beside them would overlap.
    named = {points[0].name: [], **_presets_by_point(fields)}
    marked = [point for point in points if point.name in named]
    for marker, point in zip(_MARKERS, marked, strict=False):
        labels = [", ".join(named[point.name]), point.name]
        axes.plot(
            point.speed.value,
            100 * point.quality.value,
            marker,
            markersize=13,
            markerfacecolor="none",
            markeredgecolor="#b03030",
            label=": ".join(filter(None, labels)),
        )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.set_xlabel("generated tokens per second over full depth's")
    axes.set_ylabel(f"{fields.measure}, %")
    axes.set_title(f"{_setting(fields)}\nringed: on the frontier", fontsize=10)
    return figure


def equal_compute_figure(fields: FrontierFields) -> Figure:
    """Quality over compute of the levels, of evenly spread units, and of random ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    entries = fields.equal_compute
    _line(axes, [e for e in entries if e.chosen == "chain"], "chain", "calibrated levels")
    _line(axes, [e for e in entries if e.chosen == "uniform"], "uniform", "evenly spread")
    drawn = [e for e in entries if e.chosen == "random"]
    seeds = len({entry.seed for entry in drawn})
    axes.plot(
        [100 * entry.generated_fraction for entry in drawn],
        [100 * entry.quality.value for entry in drawn],
        "x",
        color=_COLOURS["random"],
        label=f"random, {seeds} seeds",
    )
    axes.invert_xaxis()
    axes.set_xlabel("compute on generated tokens, % of full depth's")
    axes.set_ylabel(f"{fields.measure}, %")
    axes.set_title(f"as many units left out, chosen in different ways ({fields.items} items)")
    axes.legend(loc="lower left")
    return figure


def _line(axes: Axes, entries: Sequence[EqualCompute], chosen: str, label: str) -> None:
    axes.errorbar(
        [100 * entry.generated_fraction for entry in entries],
        [100 * entry.quality.value for entry in entries],
        yerr=_errors([entry.quality for entry in entries], 100),
        fmt="o-",
        color=_COLOURS[chosen],
        capsize=3,
        label=label,
    )


def _errors(intervals: Iterable[Interval], scale: float = 1.0) -> list[list[float]]:
    """Distances of the ends of intervals from their values, as matplotlib takes them."""
    held = list(intervals)
    below = [scale * (each.value - each.low) for each in held]
    return [below, [scale * (each.high - each.value) for each in held]]


def _presets_by_point(fields: FrontierFields) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for preset, name in fields.presets.items():
        found.setdefault(name, []).append(preset)
    return found


def _percent(interval: Interval) -> str:
    value, low, high = (100 * each for each in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def _setting(fields: FrontierFields) -> str:
    kind = "tasks" if fields.measure == "exact match" else "prompts"
    return f"{fields.items} {kind}, batch {fields.batch}, {fields.device}"
