"""A profile's frontier in words and as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.profile.frontier_fields import FrontierFields
from sluice.models.profile.values import Interval

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH = 140
"""Columns of a console that show the table whole."""


def frontier_table(fields: FrontierFields) -> Table:
    """Every point, the fastest last; those of the frontier are marked."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=f"{measured_on(fields)}; 95 % intervals", caption=preset_lines(fields))
    out.add_column("setting", overflow="fold")
    tokens = fields.points[0].tokens is not None and fields.measure != "token agreement"
    for heading in (
        fields.measure,
        *(["tokens of\nfull depth"] if tokens else []),
        "speed over\nfull depth",
        "compute,\ngenerated",
        "compute,\nall tokens",
        "on the\nfrontier",
        "preset",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    presets = presets_by_point(fields)
    for point in sorted(fields.points, key=lambda point: point.speed.value):
        out.add_row(
            escape(point.name),
            percent(point.quality),
            *([percent(point.tokens.agreement)] if tokens and point.tokens else []),
            f"{point.speed.value:.2f} ({point.speed.low:.2f}-{point.speed.high:.2f})",
            f"{point.generated_fraction:.1%}",
            f"{point.compute_fraction:.1%}",
            "yes" if point.on_frontier else "",
            " ".join(presets.get(point.name, ())),
        )
    return out


def preset_lines(fields: FrontierFields) -> str:
    """What the presets are, a line a point; says so where there are none."""
    full, by_name = fields.points[0], {point.name: point for point in fields.points}
    lines = []
    for name, presets in presets_by_point(fields).items():
        point = by_name[name]
        points = 100 * (point.quality.value - full.quality.value)
        gain = f"{point.speed.value:.2f} times full depth's speed, {points:+.1f} points"
        if point.tokens is not None and fields.measure != "token agreement":
            gain += f", {point.tokens.agreement.value:.1%} of its tokens"
        if point == full:
            gain = "as nothing else that loses so little gains anything"
        lines.append(f"{', '.join(presets)}: {name}, {gain}")
    return "\n".join(lines) or "no presets: serve the model at full depth"


def verdict(fields: FrontierFields) -> str:
    """What to do with the model, in a sentence."""
    full, by_name = fields.points[0], {point.name: point for point in fields.points}
    gains = [(by_name[name], preset) for preset, name in fields.presets.items()]
    gains = [(point, preset) for point, preset in gains if point != full]
    if not gains:
        tried = len(fields.points) - 1 + len(fields.failed)
        return (
            f"This model gains nothing from skipping: serve it stock. Of {tried} settings none is "
            "both shown to be faster and as good as a preset has to be."
        )
    point, preset = max(gains, key=lambda gain: gain[0].speed.value)
    lost = 100 * (point.quality.value - full.quality.value)
    what = "" if "agreement" in fields.measure else f"{lost:+.1f} points of the tasks"
    if point.tokens is not None:
        what += f"{' and ' if what else ''}{point.tokens.agreement.value:.1%} of its tokens"
    return (
        f"Use preset {preset} ({point.name}): {point.speed.value:.2f} times full depth's speed, "
        f"{what or f'{lost:+.1f} points'}."
    )


def presets_by_point(fields: FrontierFields) -> dict[str, list[str]]:
    """Names of presets, by the name of the point that they are."""
    presets: dict[str, list[str]] = {}
    for preset, point in fields.presets.items():
        presets.setdefault(point, []).append(preset)
    return presets


def percent(interval: Interval) -> str:
    """A share and its interval in percent, without the sign."""
    value, low, high = (100 * each for each in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def measured_on(fields: FrontierFields) -> str:
    """What the points were measured on."""
    kind = "prompts" if "agreement" in fields.measure else "tasks"
    return f"{fields.items} {kind}, batch {fields.batch}, {fields.mode}, {fields.device}"
