"""A profile as one HTML page that needs nothing else: no scripts, no files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sluice.models.offline.report.report_charts import BarChart, HeatMap
from sluice.models.offline.report.report_scatter import ScatterChart
from sluice.models.offline.report.template import page_template
from sluice.models.profile.fields import (
    EqualCompute,
    FrontierFields,
    ImportanceFields,
    Interval,
    ProfileFields,
)
from sluice.models.profile.profile import Profile

_TEMPLATE = Path(__file__).with_suffix(".html")
_UNITS = ("block", "attention", "mlp")
PARTS = {
    "importance": ("Importance of layers", "importance"),
    "metrics": ("Other measures of layers", "importance"),
    "exits": ("Exits and their risk", "exits"),
    "saturation": ("Saturation of layers", "exits"),
    "experts": ("Experts", "super-experts"),
    "behaviours": ("Experts behind behaviours", "behaviour"),
    "expert-k": ("Experts per layer under a budget", "expert-k"),
    "skip-ratios": ("Skip ratios", "skip-ratios"),
    "references": ("Re-mix references", "references"),
    "skip-sets": ("Skip sets found by search", "search"),
    "frontier": ("Frontier", "frontier"),
}
"""Headings of the page's parts, and the step of `sluice calibrate` that makes each."""


def report_page(profile: Profile) -> str:
    """The page, UTF-8 HTML; everything that the profile says is escaped."""
    fields = profile.fields
    filters = {"number": _number, "percent": _percent, "wire": _wire}
    return page_template(_TEMPLATE, filters).render(
        name=profile.folder.resolve().name,
        fields=fields,
        methods=sorted(profile.methods),
        parts=PARTS,
        missing=missing(fields),
        charts=_charts(fields),
        metrics=_metrics(fields),
        presets=_presets(fields.frontier),
    )


def missing(fields: ProfileFields) -> tuple[str, ...]:
    """Parts of the page that the profile has nothing for."""
    held: dict[str, Any] = {
        "importance": fields.importance,
        "metrics": fields.layer_metrics,
        "exits": fields.exits,
        "saturation": fields.saturation,
        # None of the experts being super is a finding.
        "experts": fields.expert_map or fields.super_experts,
        "behaviours": fields.behaviours,
        "expert-k": fields.expert_k,
        "skip-ratios": fields.skip_ratios,
        "references": fields.references,
        "skip-sets": fields.skip_sets,
        "frontier": fields.frontier,
    }
    return tuple(name for name in PARTS if not held[name])


def _charts(fields: ProfileFields) -> dict[str, Any]:
    """Charts by what they show, those that the profile has something for."""
    charts: dict[str, Any] = {}
    if fields.importance is not None:
        charts["importance"] = BarChart.of(
            "1 - cosine of input and output", _by_unit(fields.importance)
        )
    if fields.layer_metrics is not None:
        charts["metrics"] = _metric_charts(_metrics(fields))
    if fields.saturation is not None:
        charts["saturation"] = BarChart.of("threshold", {"threshold": fields.saturation})
    if fields.skip_ratios is not None:
        charts["skip_ratios"] = BarChart.of("skip ratio", {"ratio": fields.skip_ratios})
    if fields.expert_map is not None:
        marks = {
            "behaviour": [pair for each in fields.behaviours.values() for pair in each.experts],
            "super": fields.super_experts,
        }
        found = fields.expert_map
        if found.layers and found.load[0]:
            charts["load"] = HeatMap.of("share of tokens served", found.layers, found.load, marks)
            charts["maxima"] = HeatMap.of("largest output", found.layers, found.maxima, marks)
    if fields.frontier is not None and fields.frontier.points:
        charts["frontier"] = _frontier_chart(fields.frontier)
    if fields.frontier is not None and fields.frontier.equal_compute:
        charts["equal_compute"] = _equal_compute_chart(fields.frontier)
    return charts


def _by_unit(found: ImportanceFields) -> dict[str, tuple[float, ...]]:
    return {unit: getattr(found, unit) for unit in _UNITS}


def _metrics(fields: ProfileFields) -> dict[str, Mapping[str, tuple[float, ...]]]:
    """Layer metrics by name, each as series by name."""
    found = fields.layer_metrics
    if found is None:
        return {}
    single = ("turn", "future_effect", "lim", "zd")
    return {
        "contribution": _by_unit(found.contribution),
        **{name: {name: getattr(found, name)} for name in single},
    }


def _metric_charts(
    metrics: Mapping[str, Mapping[str, tuple[float, ...]]],
) -> dict[str, BarChart]:
    titles = {
        "contribution": "contribution: relative length of what is added",
        "turn": "turn: cosine of what is added and what was there",
        "future_effect": "future effect: largest change of a later token's later layer",
        "lim": "lim: minus the cosine of input and output",
        "zd": "zd: share of weights with a z-score above 1",
    }
    return {name: BarChart.of(titles[name], series) for name, series in metrics.items()}


def _presets(frontier: FrontierFields | None) -> dict[str, list[str]]:
    """Names of presets by the point that they are."""
    found: dict[str, list[str]] = {}
    for preset, point in {} if frontier is None else frontier.presets.items():
        found.setdefault(point, []).append(preset)
    return found


def _frontier_chart(frontier: FrontierFields) -> ScatterChart:
    presets = _presets(frontier)
    points = []
    for point in frontier.points:
        kind = "best" if point.on_frontier else "beaten"
        said = (
            f"{point.name}: {frontier.measure} {_percent(point.quality.value)}, "
            f"speed {point.speed.value:.2f}, compute {_percent(point.compute_fraction)}"
        )
        beside = ", ".join(presets.get(point.name, ()))
        points.append((point.speed, _in_percent(point.quality), kind, said, beside))
    best = sum(point.on_frontier for point in frontier.points)
    return ScatterChart.of(
        f"{frontier.measure} over speed",
        f"{len(points)} settings, {best} of them on the frontier; the table below has all numbers.",
        ("generated tokens per second, over full depth's", f"{frontier.measure}, %"),
        points,
    )


def _equal_compute_chart(frontier: FrontierFields) -> ScatterChart:
    def at(entry: EqualCompute) -> Interval:
        share = 100 * entry.generated_fraction
        return Interval(value=share, low=share, high=share)

    points = [
        (
            at(entry),
            _in_percent(entry.quality),
            entry.chosen,
            f"{entry.chosen}, {entry.units} units: {_percent(entry.quality.value)}",
            "",
        )
        for entry in frontier.equal_compute
    ]
    return ScatterChart.of(
        f"{frontier.measure} at equal compute",
        f"{len(points)} choices of what to leave out; the table below has all numbers.",
        ("compute on generated tokens, % of full depth's", f"{frontier.measure}, %"),
        points,
    )


def _in_percent(interval: Interval) -> Interval:
    low, value, high = (100 * each for each in (interval.low, interval.value, interval.high))
    return Interval(value=value, low=low, high=high)


def _number(value: float) -> str:
    """To four significant digits."""
    return f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _wire(value: Any) -> str:
    """JSON to copy into a request."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
