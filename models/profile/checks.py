"""What the parts of a profile must agree on, beyond the type of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sluice.models.depth.parameters import Number
from sluice.models.depth.registry import offered_exits
from sluice.models.profile.expert_fields import ExpertMap
from sluice.models.profile.fields import ProfileFields
from sluice.models.profile.frontier_fields import FrontierFields
from sluice.models.profile.layer_fields import ImportanceEvidence


def problems(fields: ProfileFields) -> Iterator[str]:
    """What does not fit together, each beginning with its dotted path."""
    layers = fields.model.layers
    for path, values in _per_layer(fields):
        if len(values) != layers:
            yield f"{path} has {len(values)} entries for {layers} layers"
    for path, named in _layer_lists(fields):
        yield from _wrong_layers(path, named, layers)
    yield from _wrong_exits(fields)
    if fields.importance_evidence is not None:
        yield from _wrong_evidence(fields.importance_evidence, layers)
    for name, behaviour in fields.behaviours.items():
        experts = len(behaviour.experts)
        for part in ("scores", "intervals", "p_values"):
            values = getattr(behaviour, part)
            if values is not None and len(values) != experts:
                yield f"behaviours.{name}.{part} has {len(values)} entries for {experts} experts"
    if fields.expert_map is not None:
        yield from _wrong_map(fields.expert_map)
    if fields.frontier is not None:
        yield from _wrong_frontier(fields.frontier)


def _per_layer(fields: ProfileFields) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lists with one number a decoder layer."""
    for name in ("importance", "layer_metrics", "saturation", "skip_ratios"):
        part = getattr(fields, name)
        if part is not None:
            yield from _lists(name, part if isinstance(part, tuple) else part.model_dump())
    for number, level in enumerate(fields.expert_k):
        yield f"expert_k.{number}.top_k", level.top_k


def _lists(path: str, value: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, part in value.items():
        yield from _lists(f"{path}.{name}", part)


def _layer_lists(fields: ProfileFields) -> Iterator[tuple[str, Sequence[int]]]:
    """Lists of decoder layers."""
    for number, entry in enumerate(fields.exits):
        yield f"exits.{number}.layers", entry.layers
    if fields.expert_map is not None:
        yield "expert_map.layers", fields.expert_map.layers
    levels = fields.frontier.effort if fields.frontier is not None else ()
    sets: dict[str, Any] = {f"frontier.effort.{number}": each for number, each in enumerate(levels)}
    for name in ("skip_sets", "adapters"):
        sets |= _prefixed(name, getattr(fields, name))
    for path, held in sets.items():
        yield f"{path}.attention", held.attention
        yield f"{path}.mlp", held.mlp
    for name, adapter in fields.adapters.items():
        yield f"adapters.{name}.layers", adapter.layers


def _prefixed(path: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": part for name, part in parts.items()}


def _wrong_layers(path: str, named: Sequence[int], layers: int) -> Iterator[str]:
    if [*named] != sorted({*named}):
        yield f"{path}: layers must be ascending, each named once"
    for layer in named:
        if not 0 <= layer < layers:
            yield f"{path}: layer {layer} does not exist: there are layers 0 to {layers - 1}"


def _wrong_exits(fields: ProfileFields) -> Iterator[str]:
    for number, entry in enumerate(fields.exits):
        path = f"exits.{number}"
        method = offered_exits().get(entry.method)
        threshold = None if method is None else method.parameters.get("threshold")
        if not isinstance(threshold, Number):
            yield f"{path}.method: {entry.method!r} is no exit method with a threshold"
        elif not threshold.low <= entry.threshold <= threshold.high:
            yield (
                f"{path}.threshold: {entry.threshold:g} is outside "
                f"{threshold.low:g} to {threshold.high:g}"
            )
        if not entry.layers or entry.layers[-1] == fields.model.layers - 1:
            yield f"{path}.layers: names no layer, or the last, where leaving is no exit"


def _wrong_evidence(evidence: ImportanceEvidence, layers: int) -> Iterator[str]:
    for name in ("block", "attention", "mlp"):
        unit = getattr(evidence, name)
        if unit is None:
            continue
        path = f"importance_evidence.{name}"
        if len(unit.intervals) != layers:
            yield f"{path}.intervals has {len(unit.intervals)} entries for {layers} layers"
        if sorted(unit.order) != [*range(layers)]:
            yield f"{path}.order does not name each of {layers} layers once"
        if len(unit.p_values) != layers - 1:
            yield f"{path}.p_values has {len(unit.p_values)} entries for {layers - 1} pairs"


def _wrong_map(found: ExpertMap) -> Iterator[str]:
    layers = len(found.layers)
    for name in ("load", "maxima"):
        rows = getattr(found, name)
        if len(rows) != layers:
            yield f"expert_map.{name} has {len(rows)} rows for {layers} layers"
    widths = {len(row) for row in (*found.load, *found.maxima)}
    if len(widths) > 1:
        yield f"expert_map: rows of {' and '.join(map(str, sorted(widths)))} experts"


def _wrong_frontier(frontier: FrontierFields) -> Iterator[str]:
    names = Counter(point.name for point in frontier.points)
    for name, count in names.items():
        if count > 1:
            yield f"frontier.points: {name!r} is there {count} times"
    for preset, name in frontier.presets.items():
        if name not in names:
            yield f"frontier.presets.{preset}: there is no point {name!r}"
    left_out: set[tuple[str, int]] = set()
    effort = 1.0
    for number, level in enumerate(frontier.effort):
        path = f"frontier.effort.{number}"
        own = {("attention", layer) for layer in level.attention}
        own |= {("mlp", layer) for layer in level.mlp}
        if not own > left_out:
            yield f"{path} leaves out no more than the level before it, or something else"
        if not 0.0 < level.effort < effort:
            yield f"{path}.effort: {level.effort:g} is not between 0 and {effort:g}"
        left_out, effort = own, level.effort
