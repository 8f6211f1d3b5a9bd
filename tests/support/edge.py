"""An edge without an engine: capabilities of a small model, profiles for it, policies on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.fields import ProfileFields
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import SCHEMA
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import PresetFields, parse_routing

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
    expert_shape=None,
    expert_refusal="the model has no routed experts",
    expert_routing=True,
    contrast_refusal=None,
)

SMALL = {"layers": LAYERS, "hidden": HIDDEN, "fingerprint": "0" * 64}


def profile_of(*methods: str, **fields: Any) -> Profile:
    """A profile of the small model with these fields, as if it had been read."""
    wire = {"schema_version": SCHEMA, "model": SMALL, **fields}
    return Profile(Path("profile"), ProfileFields.model_validate(wire), frozenset(methods))


def changed(profile: Profile, **fields: Any) -> Profile:
    """A profile with other fields."""
    wire = {**profile.fields.model_dump(), **fields}
    return replace(profile, fields=ProfileFields.model_validate(wire))


IMPORTANCE = {
    "block": (0.9, 0.1, 0.8, 0.2, 0.7, 0.3),
    "attention": (0.1, 0.9, 0.9, 0.9, 0.9, 0.9),
    "mlp": (0.8, 0.8, 0.2, 0.8, 0.8, 0.8),
}
PROFILE = profile_of("classifier", "first", importance=IMPORTANCE)

PROFILED = replace(CAPABILITIES, profile=PROFILE)
UNCHUNKED = replace(PROFILED, chunked_prefill=False)
DENSE_LAYER = 1
PLAIN_SHAPE = ExpertShape(layers=(0, 2, 3, 4, 5), experts=8, top_k=3)
GROUPED_SHAPE = ExpertShape(
    layers=tuple(range(LAYERS)),
    experts=16,
    top_k=4,
    scoring="sigmoid",
    scale=2.5,
    groups=4,
    topk_group=2,
    corrected=True,
)
EXPERT_PROFILE = changed(
    PROFILE,
    super_experts=((0, 1), (3, 7)),
    references={
        "sums": {"layers": (2, 4, 5), "width": HIDDEN},
        "tales": {"layers": (4, 5), "width": 3, "encoder": "sentences"},
    },
)
MOE = replace(CAPABILITIES, experts=8, expert_shape=PLAIN_SHAPE, expert_refusal=None)
GROUPED = replace(MOE, experts=16, expert_shape=GROUPED_SHAPE)
MOE_PROFILED = replace(MOE, profile=EXPERT_PROFILE)

SKIP_PARAM, EXIT, ADAPTIVE = (f"routing.depth.{name}" for name in ("skip", "exit", "adaptive"))
EXPERTS = "routing.experts"
PHASE, EFFORT = "routing.depth.phase", "routing.effort"

ALL_EXITS = tuple(range(LAYERS - 1))
CONFIDENT = {"method": "confidence", "threshold": 0.5}
HUGE = 10**400
"""A JSON number beyond every float."""


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


def experts(**fields: Any) -> dict[str, Any]:
    return {"experts": fields}


def named(layer: int, *ids: int, **more: Any) -> list[dict[str, Any]]:
    """`deactivate` or `activate` with one entry."""
    return [{"layer": layer, "experts": [*ids], **more}]


def expert_policy(
    capabilities: Capabilities = MOE, preset: dict[str, Any] | None = None, **fields: Any
) -> ExpertPolicy:
    return policy(experts(**fields), capabilities, preset).experts


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
