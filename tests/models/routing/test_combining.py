"""What a request may add to a preset, as the listing of presets says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import CAPABILITIES, LAYERS, MOE, MOE_PROFILED, PROFILED

from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.combining import combining_fields
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import DepthFields, ExpertFields, PresetFields, parse_routing
from sluice.server.admission import Admission
from sluice.server.http.routes import preset_listing

DEPTH = [f"depth.{name}" for name in DepthFields.model_fields]
EXPERTS = [f"experts.{name}" for name in ExpertFields.model_fields]
NO_CONTRAST = [name for name in EXPERTS if name != "experts.contrast"]
ALL = {"effort", *DEPTH, *EXPERTS}
ADAPTIVE = {"depth": {"adaptive": {"method": "similarity", "budget": 0.5}}}


def listed(preset: dict[str, Any], capabilities: Capabilities = MOE) -> set[str]:
    presets = {"p": PresetFields.model_validate(preset)}
    fields = combining_fields("p", presets, capabilities)
    assert len(fields) == len({*fields})
    return {*fields}


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        # A phase needs something to act on.
        ({}, ALL - {"depth.phase"}),
        ({"depth": {"skip": {"blocks": [3]}}}, {"depth.skip", "depth.exit", "depth.phase"}),
        (
            {"depth": {"exit": {"method": "confidence", "threshold": 0.5}}},
            {"depth.skip", "depth.exit"},
        ),
        (ADAPTIVE, {"depth.adaptive"}),
        ({"effort": 0.5}, {"effort", "depth.phase"}),
    ],
    ids=["nothing", "skip", "exit", "adaptive", "effort"],
)
def test_depth(preset: dict[str, Any], fields: set[str]) -> None:
    experts = {*EXPERTS} if not preset else {*NO_CONTRAST}
    assert listed(preset, MOE_PROFILED) == (fields - {*EXPERTS}) | experts


def test_a_contrast_is_alone() -> None:
    fields = listed({"experts": {"contrast": {"weak_rank": 1}}})
    assert fields == {"experts.contrast", "experts.protect_super_experts"}


def test_what_the_engine_cannot_do_is_not_there() -> None:
    assert not {each for each in listed({}, CAPABILITIES) if each.startswith("experts.")}
    assert listed({}, replace(MOE, refusal="it is an OPT")) == set()
    assert "experts.contrast" not in listed({}, replace(MOE, contrast_refusal="no room"))


@pytest.mark.parametrize(
    "capabilities", [MOE, MOE_PROFILED, PROFILED], ids=["moe", "both", "dense"]
)
def test_a_preset_of_any_kind_takes_what_replaces_its_own(capabilities: Capabilities) -> None:
    assert "depth.skip" in listed({"depth": {"skip": {"blocks": [0]}}}, capabilities)
    assert "depth.exit" in listed(
        {"depth": {"exit": {"method": "fixed", "layers": [1]}}}, capabilities
    )


def test_a_field_that_is_not_listed_is_refused_whatever_it_says() -> None:
    presets = {"p": PresetFields.model_validate({"depth": {"skip": {"blocks": [3]}}})}
    for effort in (0.1, 0.5, 1.0):
        fields = parse_routing({"preset": "p", "effort": effort})
        with pytest.raises(RoutingError, match="does not go together"):
            resolve(merge_preset(fields, presets, "routing.preset"), MOE)


def test_the_listing_of_presets_says_so() -> None:
    preset = PresetFields.model_validate({"depth": {"skip": {"blocks": [LAYERS - 1]}}})
    assert {*preset_listing(Admission(MOE, {"p": preset}), "p")["combines_with"]} == {
        "depth.skip",
        "depth.exit",
        "depth.phase",
        *NO_CONTRAST,
    }
