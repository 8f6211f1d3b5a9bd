"""A profile as one HTML page that needs nothing else: no scripts, no files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sluice.models.offline.report.charts import (
    equal_compute_chart,
    expert_map,
    frontier_chart,
    layer_bars,
)
from sluice.models.offline.report.frontier import presets_by_point, verdict
from sluice.models.offline.report.template import page_template
from sluice.models.profile.fields import ProfileFields
from sluice.models.profile.layer_fields import ImportanceFields
from sluice.models.profile.profile import Profile

_TEMPLATE = Path(__file__).with_suffix(".html")
_METRICS = {
    "contribution": "contribution: relative length of what is added",
    "turn": "turn: cosine of what is added and what was there",
    "future_effect": "future effect: largest change of a later token's later layer",
    "lim": "lim: minus the cosine of input and output",
    "zd": "zd: share of weights with a z-score above 1",
}
"""Titles of the charts of layer metrics."""
PARTS = {
    "frontier": ("Frontier", "frontier"),
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
}
"""Headings of the page's parts, and the step of `sluice calibrate` that makes each."""
_OF_EXPERTS = ("experts", "behaviours", "expert-k", "skip-ratios", "references")


def report_page(profile: Profile) -> str:
    """The page, UTF-8 HTML; everything that the profile says is escaped."""
    fields = profile.fields
    steps = fields.calibration
    filters = {"number": _number, "percent": _percent, "wire": _wire}
    return page_template(_TEMPLATE, filters).render(
        name=profile.folder.resolve().name,
        fields=fields,
        methods=sorted(profile.methods),
        parts=parts_of(fields),
        missing=missing(fields),
        charts=_charts(fields),
        metrics=_metrics(fields),
        date=max((made.date for made in steps.values() if made.date), default=None),
        versions={name: v for made in steps.values() for name, v in made.versions.items()},
        data=_steps_by_data(fields),
        presets={} if fields.frontier is None else presets_by_point(fields.frontier),
        verdict=None if fields.frontier is None else verdict(fields.frontier),
    )


def _steps_by_data(fields: ProfileFields) -> dict[str, list[str]]:
    """Steps of the calibration by the digest of the examples that they were run on."""
    steps: dict[str, list[str]] = {}
    for name, made in fields.calibration.items():
        steps.setdefault(made.data, []).append(name)
    return steps


def missing(fields: ProfileFields) -> tuple[str, ...]:
    """Parts of the page that the profile has nothing for."""
    held: dict[str, Any] = {
        "importance": fields.importance,
        "metrics": fields.layer_metrics,
        "exits": fields.exits or fields.exit_failures,
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
    return tuple(name for name in parts_of(fields) if not held[name])


def parts_of(fields: ProfileFields) -> dict[str, tuple[str, str]]:
    """Parts of the page; those about experts only where the model has some, or nobody knows."""
    dense = fields.model.experts is False
    return {name: part for name, part in PARTS.items() if not (dense and name in _OF_EXPERTS)}


def _charts(fields: ProfileFields) -> dict[str, Any]:
    """Charts by what they show, those that the profile has something for."""
    charts: dict[str, Any] = {}
    if fields.importance is not None:
        charts["importance"] = layer_bars(
            "1 - cosine of input and output", _by_unit(fields.importance)
        )
    if fields.layer_metrics is not None:
        series = _metrics(fields)
        charts["metrics"] = {name: layer_bars(_METRICS[name], series[name]) for name in series}
    if fields.saturation is not None:
        charts["saturation"] = layer_bars("threshold", {"threshold": fields.saturation})
    if fields.skip_ratios is not None:
        charts["skip_ratios"] = layer_bars("skip ratio", {"ratio": fields.skip_ratios})
    measured = fields.expert_map
    if measured is not None and measured.layers and measured.load[0]:
        marks = {
            "behaviour": [pair for each in fields.behaviours.values() for pair in each.experts],
            "super": fields.super_experts,
        }
        layers = measured.layers
        charts["load"] = expert_map("share of tokens served", layers, measured.load, marks)
        charts["maxima"] = expert_map("largest output", layers, measured.maxima, marks)
    if fields.frontier is not None and fields.frontier.points:
        charts["frontier"] = frontier_chart(fields.frontier)
    if fields.frontier is not None and fields.frontier.equal_compute:
        charts["equal_compute"] = equal_compute_chart(fields.frontier)
    return charts


def _by_unit(fields: ImportanceFields) -> dict[str, tuple[float, ...]]:
    return {"block": fields.block, "attention": fields.attention, "MLP": fields.mlp}


def _metrics(fields: ProfileFields) -> dict[str, dict[str, tuple[float, ...]]]:
    """Layer metrics by name, each as series by name."""
    metrics = fields.layer_metrics
    if metrics is None:
        return {}
    return {
        name: _by_unit(metrics.contribution)
        if name == "contribution"
        else {name: getattr(metrics, name)}
        for name in _METRICS
    }


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
