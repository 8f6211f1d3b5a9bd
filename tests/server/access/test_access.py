"""What each capability may ask for, as one table, and that no path or field goes round it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import CAPABILITIES

from sluice.models.routing.errors import REASONS, RoutingError
from sluice.models.routing.resolve import merge_preset
from sluice.models.routing.schema import PresetFields, RoutingFields, parse_routing
from sluice.server.access import capability as access
from sluice.server.access.capability import Caller, Capability, ForbiddenError, check_access
from sluice.server.admission import Admission
from sluice.server.endpoints import ROUTED

BASIC, DEPTH, EXPERTS, ADMIN = Capability
FEW: dict[str, Any] = {"top_k": 2}
UNPROTECTED: dict[str, Any] = {**FEW, "protect_super_experts": False}
SKIP: dict[str, Any] = {"skip": {"mlp": [1]}}
PRESETS = {
    name: PresetFields.model_validate(fields)
    for name, fields in {
        "shallow": {"depth": SKIP},
        "few": {"experts": FEW},
        "bare": {"experts": UNPROTECTED},
    }.items()
}
PROTECT = "routing.experts.protect_super_experts"

ASKED: dict[str, tuple[dict[str, Any], Capability, str]] = {
    "nothing": ({}, BASIC, ""),
    "report": ({"report": True}, BASIC, ""),
    "preset": ({"preset": "shallow"}, BASIC, ""),
    "preset with experts": ({"preset": "few"}, BASIC, ""),
    "preset without protection": ({"preset": "bare", "report": True}, BASIC, ""),
    "depth": ({"depth": SKIP}, DEPTH, "routing.depth"),
    "empty depth": ({"depth": {}}, DEPTH, "routing.depth"),
    "depth over a preset": ({"preset": "few", "depth": SKIP}, DEPTH, "routing.depth"),
    "effort": ({"effort": 0.5}, DEPTH, "routing.effort"),
    "effort over a preset": ({"preset": "shallow", "effort": 1}, DEPTH, "routing.effort"),
    "no effort": ({"effort": None}, BASIC, ""),
    "experts": ({"experts": FEW}, EXPERTS, "routing.experts"),
    "empty experts": ({"experts": {}}, EXPERTS, "routing.experts"),
    "no experts": ({"experts": None}, BASIC, ""),
    "experts over a preset": ({"preset": "few", "experts": FEW}, EXPERTS, "routing.experts"),
    "protected by name": (
        {"experts": {"protect_super_experts": True}},
        EXPERTS,
        "routing.experts",
    ),
    "protected again": (
        {"preset": "bare", "experts": {"protect_super_experts": True}},
        EXPERTS,
        "routing.experts",
    ),
    "unprotected": ({"experts": UNPROTECTED}, ADMIN, PROTECT),
    "unprotected over a preset": ({"preset": "few", "experts": UNPROTECTED}, ADMIN, PROTECT),
    "under a preset's lack of protection": ({"preset": "bare", "experts": FEW}, ADMIN, PROTECT),
}


def check(routing: dict[str, Any], capability: Capability, *, flag: bool = True) -> None:
    own = parse_routing(routing)
    merged = merge_preset(own, PRESETS, "routing.preset")
    check_access(own, merged, "routing.preset", Caller("k", capability), expert_routing=flag)


@pytest.mark.parametrize("capability", Capability)
@pytest.mark.parametrize("asked", ASKED)
def test_who_may_ask(asked: str, capability: Capability) -> None:
    routing, needed, param = ASKED[asked]
    if [*Capability].index(capability) >= [*Capability].index(needed):
        check(routing, capability)
        return
    with pytest.raises(ForbiddenError) as caught:
        check(routing, capability)
    low = capability in (BASIC, DEPTH) and needed is ADMIN
    assert caught.value.param == ("routing.experts" if low else param)
    error = caught.value.body()["error"]
    assert (error["code"], error["type"]) == (403, "PermissionDeniedError")
    assert caught.value.reason in REASONS


@pytest.mark.parametrize(
    ("routing", "param"),
    [
        ({"experts": FEW}, "routing.experts"),
        ({"experts": {}}, "routing.experts"),
        ({"preset": "few"}, "routing.preset"),
        ({"preset": "few", "experts": FEW}, "routing.experts"),
        ({"preset": "few", "depth": SKIP}, "routing.preset"),
    ],
)
def test_the_server_flag_stops_even_an_admin(routing: dict[str, Any], param: str) -> None:
    check(routing, ADMIN)
    with pytest.raises(ForbiddenError, match="--expert-routing") as caught:
        check(routing, ADMIN, flag=False)
    assert caught.value.param == param


def test_the_flag_leaves_depth_alone() -> None:
    check({"preset": "shallow", "depth": SKIP}, DEPTH, flag=False)


def test_every_field_of_routing_has_a_capability() -> None:
    assert set(access._NEEDED) == set(RoutingFields.model_fields)


PATHS = [*sorted(ROUTED), "/v1/chat/completions/batch", "/invocations", "/tokenize"]
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "routing.experts": ({"routing": {"experts": FEW}}, "routing.experts"),
    "routing.depth": ({"routing": {"depth": SKIP}}, "routing.depth"),
    "beside a preset": ({"model": "m@shallow", "routing": {"experts": {}}}, "routing.experts"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", BODIES)
def test_forbidden_comes_before_what_the_path_cannot_do(path: str, where: str) -> None:
    body, param = BODIES[where]
    admission = Admission(replace(CAPABILITIES, expert_routing=True), PRESETS)
    with pytest.raises(ForbiddenError) as caught:
        admission.admit(path, body, Caller("k", BASIC))
    assert caught.value.param == param


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "param"),
    [({"model": "m@few"}, "model"), ({"routing": {"preset": "few"}}, "routing.preset")],
)
def test_the_flag_counts_on_every_path(path: str, body: dict[str, Any], param: str) -> None:
    admission = Admission(replace(CAPABILITIES, expert_routing=False), PRESETS)
    with pytest.raises(ForbiddenError) as caught:
        admission.admit(path, body, Caller(None, ADMIN))
    assert caught.value.param == param


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["vllm_xargs", "extra_args"])
def test_not_even_an_admin_smuggles(path: str, field: str) -> None:
    admission = Admission(replace(CAPABILITIES, expert_routing=True), PRESETS)
    for body, param in (
        ({field: {"sluice": "{}"}}, f"{field}.sluice"),
        ({"a": [{"b": {field: {"sluice": "{}"}}}]}, f"a.0.b.{field}.sluice"),
    ):
        with pytest.raises(RoutingError) as caught:
            admission.admit(path, body, Caller("k", ADMIN))
        assert (caught.value.param, caught.value.reason) == (param, "reserved_argument")
