"""Which fields of `routing` a request may add to a preset on this engine.

The rules are those of `resolve`: each field is added to the preset with values that are right by
themselves, and is listed if one of them is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sluice.models.depth.method import DepthMethod, StaticExit
from sluice.models.depth.parameters import Number
from sluice.models.depth.registry import adaptive_methods, offered_exits
from sluice.models.policy.experts import RemixMethod
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts.parameters import BUDGETS, DEACTIVATE_MODES, remix_layers
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import PresetFields, parse_routing


def combining_fields(
    name: str, presets: Mapping[str, PresetFields], capabilities: Capabilities
) -> list[str]:
    """Fields, dotted below `routing`, that go together with a preset or replace its own.

    A field that is not there is refused beside this preset whatever its value. One that is there
    may still be refused for a value. Whether the caller may use it is another question
    (`sluice.server.access`).

    Args:
        name: of the preset.
        presets: by name.
        capabilities: of the engine.
    """
    return [
        field
        for field, values in _examples(capabilities).items()
        if any(_accepted(name, value, presets, capabilities) for value in values)
    ]


def _accepted(
    preset: str,
    routing: dict[str, Any],
    presets: Mapping[str, PresetFields],
    capabilities: Capabilities,
) -> bool:
    try:
        fields = parse_routing({"preset": preset, **routing})
        resolve(merge_preset(fields, presets, "routing.preset"), capabilities)
    except RoutingError:
        return False
    return True


def _examples(capabilities: Capabilities) -> dict[str, Sequence[dict[str, Any]]]:
    """Routing objects with one field each, by the field's path."""
    blocks = [{"blocks": [layer]} for layer in range(capabilities.layers)]
    depth: dict[str, Sequence[Any]] = {
        "skip": blocks[-1:] + blocks[:-1],
        "exit": [*_exits(capabilities)],
        "adaptive": [
            {"method": name, **numbers}
            for name, method in adaptive_methods().items()
            for numbers in _numbers(method)
        ],
        "phase": ["decode", "both"],
    }
    return {
        "effort": [{"effort": 1.0}],
        **{
            f"depth.{field}": [{"depth": {field: value}} for value in values]
            for field, values in depth.items()
        },
        **{
            f"experts.{field}": [{"experts": value} for value in values]
            for field, values in _expert_examples(capabilities).items()
        },
    }


def _exits(capabilities: Capabilities) -> Iterator[dict[str, Any]]:
    for name, method in offered_exits().items():
        layers = {"layers": [0]} if isinstance(method, StaticExit) else {}
        for numbers in _numbers(method):
            yield {"method": name, **layers, **numbers}
        if capabilities.calibrated_exits(name):
            yield {"method": name}


def _numbers(method: DepthMethod) -> Iterator[dict[str, float]]:
    """What a method needs, and each optional number of which it may need one."""
    ranges = {name: p for name, p in method.parameters.items() if isinstance(p, Number)}
    needed = {n: p.low for n, p in ranges.items() if p.default is None and not p.optional}
    yield needed
    for name, number in ranges.items():
        if number.optional:
            yield {**needed, name: (number.low + number.high) / 2}


def _expert_examples(capabilities: Capabilities) -> dict[str, Sequence[dict[str, Any]]]:
    """`experts` objects by field; none where the engine controls no experts."""
    shape = capabilities.expert_shape
    if shape is None or capabilities.expert_refusal is not None:
        return {}
    layer, k = shape.layers[0], shape.top_k
    supers = capabilities.profile.super_experts if capabilities.profile else ()
    expert = next(n for n in range(shape.experts + 1) if (layer, n) not in supers)
    named = [{"layer": layer, "experts": [expert]}]
    remixes: list[dict[str, Any]] = [
        {"method": method.value, "references": name}
        for method in RemixMethod
        for name in capabilities.references
    ]
    row = [1.0] * shape.experts
    remixes.append({"method": "supplied", "pathway": [row for _ in remix_layers(shape)]})
    return {
        "deactivate": [{"deactivate": named}],
        "mode": [{"deactivate": named, "mode": mode} for mode in DEACTIVATE_MODES],
        "activate": [{"activate": named}, {"activate": [{**named[0], "weight": 1.0}]}],
        "bias": [{"bias": [{"layer": layer, "expert": expert, "value": 1.0}]}],
        "top_k": [{"top_k": number} for number in {k - 1, k + 1}],
        "top_p": [{"top_p": 0.5}],
        "skip_ratio": [{"skip_ratio": 0.5}],
        "budget": [
            {"budget": {"method": method.value, name: value}}
            for method in BUDGETS
            for name, value in (("k0", 1), ("experts", shape.experts))
        ],
        "remix": [{"remix": remix} for remix in remixes],
        "contrast": [{"contrast": {"weak_rank": rank}} for rank in (0, 1)],
        "protect_super_experts": [{"protect_super_experts": False}],
    }
