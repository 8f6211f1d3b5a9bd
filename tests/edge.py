"""An edge without an engine: capabilities of a small model, profiles for it, policies on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.models.depth.order import Unit
from sluice.models.policy import RoutingPolicy
from sluice.models.profile import Profile
from sluice.server.capabilities import Capabilities
from sluice.server.errors import RoutingError
from sluice.server.resolve import merge_preset, resolve
from sluice.server.schema import PresetFields, parse_routing

LAYERS = 6
HIDDEN = 8

CAPABILITIES = Capabilities(
    models=("m", "alias@x"),
    architecture="LlamaForCausalLM",
    layers=LAYERS,
    hidden=HIDDEN,
    experts=0,
    chunked_prefill=True,
    refusal=None,
    profile=None,
)

PROFILE = Profile(
    folder=Path("profile"),
    layers=LAYERS,
    hidden=HIDDEN,
    importance={
        Unit.BLOCK: (0.9, 0.1, 0.8, 0.2, 0.7, 0.3),
        Unit.ATTENTION: (0.1, 0.9, 0.9, 0.9, 0.9, 0.9),
        Unit.MLP: (0.8, 0.8, 0.2, 0.8, 0.8, 0.8),
    },
    methods=frozenset({"classifier", "first"}),
)

PROFILED = replace(CAPABILITIES, profile=PROFILE)
UNCHUNKED = replace(PROFILED, chunked_prefill=False)
SKIP_PARAM, EXIT, ADAPTIVE = (f"routing.depth.{name}" for name in ("skip", "exit", "adaptive"))
PHASE, EFFORT = "routing.depth.phase", "routing.effort"

ALL_EXITS = tuple(range(LAYERS - 1))
CONFIDENT = {"method": "confidence", "threshold": 0.5}


def policy(
    routing: dict[str, Any],
    capabilities: Capabilities = CAPABILITIES,
    preset: dict[str, Any] | None = None,
) -> RoutingPolicy:
    presets = {} if preset is None else {"p": PresetFields.model_validate(preset)}
    fields = parse_routing(routing if preset is None else {**routing, "preset": "p"})
    return resolve(merge_preset(fields, presets, "routing.preset"), capabilities)


def depth(**fields: Any) -> dict[str, Any]:
    return {"depth": fields}


def leaving(method: str = "confidence", **fields: Any) -> dict[str, Any]:
    return depth(exit={"method": method, "threshold": 0.5, **fields})


def refused(
    routing: dict[str, Any],
    capabilities: Capabilities = CAPABILITIES,
    preset: dict[str, Any] | None = None,
) -> tuple[str, str]:
    with pytest.raises(RoutingError) as caught:
        policy(routing, capabilities, preset)
    return caught.value.param, caught.value.reason
