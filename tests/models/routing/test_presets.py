"""Presets that a profile measured: beside those of a file, listed, and refused if they must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.edge import CAPABILITIES, LAYERS, MOE, PROFILE, changed
from support.full_profile import MEASURED, frontier, point

from sluice.models.policy.policy import SkipSet
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import (
    PresetsFileError,
    all_presets,
    check_presets,
    profile_presets,
)
from sluice.server.access.capability import Caller, Capability, ForbiddenError
from sluice.server.admission import Admission
from sluice.server.http.listing import capabilities_listing
from sluice.server.http.routes import preset_listing

CALLER = Caller(None, Capability.BASIC)
PATH = "/v1/completions"
POINTS = [
    point("full depth"),
    point("last block", depth={"skip": {"blocks": [5]}}),
    point("two experts", experts={"top_k": 2}),
    point("too deep", depth={"skip": {"blocks": [9]}}),
]
NAMES = {
    "quality": "full depth",
    "balanced": "last block",
    "fast": "two experts",
    "odd": "too deep",
}


def profile(points: list[dict[str, Any]] = POINTS, presets: Mapping[str, str] = NAMES) -> Profile:
    return changed(PROFILE, frontier=frontier(points, presets))


def admission(capabilities: Capabilities = MOE, file: Path | None = None) -> Admission:
    measured = profile()
    return Admission(replace(capabilities, profile=measured), all_presets(file, measured))


def refusal(admitting: Admission, **body: Any) -> RoutingError:
    with pytest.raises(RoutingError) as caught:
        admitting.admit(PATH, body, CALLER)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "presets.yaml"
    path.write_text("presets: {mine: {description: own, effort: 0.5}}")
    return path


def test_both_kinds_are_served(file: Path) -> None:
    admitting = admission(file=file)
    assert [*admitting.presets] == ["mine", *NAMES]
    check_presets(admitting.presets, admitting.capabilities)
    by_name = admitting.admit(PATH, {"model": "m", "routing": {"preset": "balanced"}}, CALLER)
    by_model = admitting.admit(PATH, {"model": "m@balanced"}, CALLER)
    assert by_name is not None
    assert by_model is not None
    assert by_name.extra.policy == by_model.extra.policy
    assert by_name.extra.policy.skip == SkipSet.of(blocks=(5,))
    assert (by_name.preset, by_model.preset, by_model.body["model"]) == (
        "balanced",
        "balanced",
        "m",
    )


def test_a_request_may_override_a_measured_preset() -> None:
    body = {"model": "m@balanced", "routing": {"depth": {"skip": {"mlp": [1]}}}}
    admitted = admission().admit(PATH, body, Caller(None, Capability.DEPTH))
    assert admitted is not None
    assert admitted.extra.policy.skip == SkipSet.of(mlp=(1,))


def test_what_was_measured_is_listed(file: Path) -> None:
    listed = preset_listing(admission(file=file), "balanced")
    assert listed == {
        "id": "balanced",
        "object": "routing.preset",
        "description": "measured: last block",
        "model": "m@balanced",
        "policy": {
            "depth": {"skip": {"attention": [5], "mlp": [5]}, "phase": "both"},
        },
        "combines_with": listed["combines_with"],
        "available": True,
        "reason": None,
        "measured": {
            "point": "last block",
            "quality": {"measure": "exact match", **MEASURED},
            "speed": MEASURED,
            "compute_fraction": 0.75,
            "generated_compute_fraction": 0.5,
            "items": 100,
            "batch": 8,
            "device": "a CPU",
            "mode": "eager",
            "warning": None,
        },
    }
    own = preset_listing(admission(file=file), "mine")
    assert (own["description"], own["available"], own["measured"]) == ("own", True, None)
    without = Admission(CAPABILITIES, all_presets(file, None))
    assert preset_listing(without, "mine")["measured"] is None


def test_speeds_of_another_way_to_run_are_warned_of(file: Path) -> None:
    """A profile measured eager on a server that compiles, and the other way round."""
    eager = admission(file=file)
    assert eager.capabilities.speed_warning is None
    compiled = replace(eager.capabilities, mode="compiled")
    said = preset_listing(replace(eager, capabilities=compiled), "balanced")["measured"]["warning"]
    assert (
        said
        == compiled.speed_warning
        == (
            "the profile's speeds were measured in an engine that ran eager, and this one runs "
            "compiled: measure them again with `sluice calibrate frontier`"
        )
    )
    listing = capabilities_listing(compiled)
    assert (listing["mode"], listing["speed_warning"]) == ("compiled", said)
    assert capabilities_listing(replace(compiled, profile=None))["speed_warning"] is None


def test_a_point_that_this_engine_cannot_do_does_not_stop_it() -> None:
    admitting = admission()
    check_presets(admitting.presets, admitting.capabilities)
    listed = preset_listing(admitting, "odd")
    assert (listed["available"], listed["policy"]) == (False, None)
    assert listed["reason"] == f"layer 9 does not exist: the model has layers 0 to {LAYERS - 1}"
    assert listed["measured"]["point"] == "too deep"
    for body, param in (
        ({"model": "m", "routing": {"preset": "odd"}}, "routing.preset"),
        ({"model": "m@odd"}, "model"),
    ):
        error = refusal(admitting, **body)
        assert (error.status, error.param, error.reason) == (400, param, "layer_out_of_range")
        assert error.message == f"preset 'odd' is not available: {listed['reason']}"


def test_a_field_of_the_requests_own_is_named_itself() -> None:
    routing = {"preset": "odd", "depth": {"skip": {"mlp": [7]}}}
    with pytest.raises(RoutingError) as caught:
        admission().admit(PATH, {"routing": routing}, Caller(None, Capability.ADMIN))
    assert caught.value.param == "routing.depth.skip.mlp.0"
    cured = {"preset": "odd", "depth": {"skip": {"mlp": [1]}}}
    assert admission().admit(PATH, {"routing": cured}, Caller(None, Capability.DEPTH)) is not None


def test_experts_where_expert_routing_is_off() -> None:
    admitting = admission(replace(MOE, expert_routing=False))
    check_presets(admitting.presets, admitting.capabilities)
    listed = preset_listing(admitting, "fast")
    assert not listed["available"]
    assert "expert routing is off on this server" in listed["reason"]
    assert listed["policy"] == {"experts": {"top_k": 2}}
    error = refusal(admitting, model="m@fast")
    assert isinstance(error, ForbiddenError)
    assert (error.status, error.param) == (403, "model")
    assert preset_listing(admitting, "balanced")["available"]


@pytest.mark.parametrize(
    ("capabilities", "available", "reason"),
    [
        (CAPABILITIES, {"quality", "balanced"}, "the model has no routed experts"),
        (replace(MOE, refusal="it is an OPT"), set(), "it is an OPT"),
    ],
    ids=["dense", "refused"],
)
def test_an_engine_that_refuses_controls(
    capabilities: Capabilities, available: set[str], reason: str
) -> None:
    admitting = admission(capabilities)
    check_presets(admitting.presets, admitting.capabilities)
    listed = {name: preset_listing(admitting, name) for name in admitting.presets}
    assert {name for name, entry in listed.items() if entry["available"]} == available
    assert reason in listed["fast"]["reason"]
    error = refusal(admitting, model="m", routing={"preset": "fast"})
    assert (error.status, error.param, error.reason) == (400, "routing.preset", "unsupported_model")


def test_a_preset_of_a_file_still_stops_the_server(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text("presets: {mine: {depth: {skip: {blocks: [9]}}}}")
    admitting = admission(file=path)
    with pytest.raises(RoutingError) as caught:
        check_presets(admitting.presets, admitting.capabilities)
    assert caught.value.param == "presets.mine.depth.skip.blocks.0"


def test_a_name_in_both_names_both(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text("presets: {fast: {effort: 0.5}}")
    with pytest.raises(PresetsFileError) as caught:
        all_presets(path, profile())
    assert str(caught.value) == (
        f"preset 'fast' is in presets file {path} and in profile profile: rename the one in the "
        "file"
    )


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "upper case": ("Fast", {}, r"frontier\.presets\.Fast: not a preset name"),
    "a label of its own": ("custom", {}, r"frontier\.presets\.custom: not a preset name"),
    "an unknown field": ("fast", {"deep": 1}, r"frontier\.presets\.fast\.routing\.deep: no such"),
    "a preset": ("fast", {"preset": "x"}, r"frontier\.presets\.fast\.routing\.preset: no such"),
    "a description": ("fast", {"description": "x"}, r"routing\.description: no such"),
    "a wrong type": (
        "fast",
        {"depth": {"skip": {"blocks": ["1"]}}},
        r"frontier\.presets\.fast\.routing\.depth\.skip\.blocks\.0: must",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_point_that_is_no_policy(name: str) -> None:
    preset, routing, complaint = BROKEN[name]
    with pytest.raises(ProfileError, match=complaint):
        profile_presets(profile([point("a", **routing)], {preset: "a"}))


def test_a_profile_without_a_frontier() -> None:
    assert all_presets(None, PROFILE) == all_presets(None, None) == {}
