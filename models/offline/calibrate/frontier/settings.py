"""Candidates for the frontier: what the parts of a calibration offer, as clients ask for it.

A setting is a `routing` object. Depth settings act on generated tokens alone, but for those whose
method has phases of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.models.depth.adaptive.first import First
from sluice.models.depth.skip_order import Unit
from sluice.models.policy.policy import Phase, SkipSet

_DROPPED = {Unit.BLOCK: (0.125, 0.25, 0.375, 0.5), Unit.ATTENTION: (0.25, 0.5, 0.75)}
"""Shares of LLM-Drop's orders."""
_FIRST_THRESHOLDS = (0.3, 0.5, 0.7)
_RATIO_SCALES = (0.5, 1.0)
"""Of NAEE's medians; a larger ratio drops more experts."""


@dataclass(frozen=True)
class Setting:
    """A candidate.

    Attributes:
        name: of its point.
        routing: the wire object that asks for it.
    """

    name: str
    routing: Mapping[str, Any]


FULL_DEPTH = Setting("full depth", {})


def skip_setting(name: str, skip: SkipSet) -> Setting:
    """Sub-layers left out of generated tokens; the set is of that phase."""
    assert skip.phase is Phase.DECODE
    lists: dict[str, Any] = {"attention": [*skip.attention], "mlp": [*skip.mlp]}
    if skip.attention == skip.mlp:
        lists = {"blocks": [*skip.mlp]}
    return Setting(name, {"depth": {"skip": lists, "phase": Phase.DECODE.value}})


def depth_settings(
    fields: Mapping[str, Any], heads: Collection[str], layers: int
) -> Iterator[Setting]:
    """LLM-Drop's orders, calibrated exits, FiRST's routers, found skip sets and adapters, if there
    are any.

    Args:
        fields: of the profile so far.
        heads: names of its trained tensors.
        layers: of the model.
    """
    for unit, shares in _DROPPED.items() if "importance" in fields else ():
        for share in shares:
            # As a request's fraction is rounded.
            if 0 < math.floor(share * layers + 0.5) < layers:
                skip = {"fraction": share, "by": unit.value}
                depth = {"skip": skip, "phase": Phase.DECODE.value}
                yield Setting(f"drop {share:.1%} of {unit.value}s", {"depth": depth})
    for entry in fields.get("exits", ()):
        rule = {name: entry[name] for name in ("method", "layers", "threshold")}
        name = f"exit by {entry['method']} at {entry['threshold']:.4g}"
        yield Setting(name, {"depth": {"exit": rule}})
    if all(f"{First.name}.{tensor}" in heads for tensor in First.profile_tensors):
        for threshold in _FIRST_THRESHOLDS:
            rule = {"method": First.name, "threshold": threshold}
            yield Setting(f"{First.name} at {threshold:g}", {"depth": {"adaptive": rule}})
    for name, found in fields.get("skip_sets", {}).items():
        attention, mlp = tuple(found["attention"]), tuple(found["mlp"])
        yield skip_setting(name, SkipSet.of(attention=attention, mlp=mlp, phase=Phase.DECODE))
    for name in fields.get("adapters", {}):
        yield Setting(f"adapter {name}", {"depth": {"skip": {"adapter": name}}})


def expert_settings(fields: Mapping[str, Any], top_k: int) -> Iterator[Setting]:
    """Fewer experts per token: LExI's levels, NAEE's ratios, and plain cuts.

    Args:
        fields: of the profile so far.
        top_k: experts per token of the model.
    """
    for level in fields.get("expert_k", ()):
        name = f"{level['budget']} experts over the layers"
        yield Setting(name, {"experts": {"top_k": [*level["top_k"]]}})
    ratios: Sequence[float] = fields.get("skip_ratios") or ()
    for scale in _RATIO_SCALES if ratios else ():
        scaled = [scale * ratio for ratio in ratios]
        yield Setting(f"skip ratios times {scale:g}", {"experts": {"skip_ratio": scaled}})
    for count in sorted({top_k - 1, (top_k + 1) // 2} & {*range(1, top_k)}, reverse=True):
        yield Setting(f"{count} of {top_k} experts", {"experts": {"top_k": count}})


def together(depth: Sequence[Setting], experts: Sequence[Setting]) -> Iterator[Setting]:
    """Every depth setting with every expert setting."""
    for one in depth:
        for other in experts:
            yield Setting(f"{one.name}, {other.name}", {**one.routing, **other.routing})
