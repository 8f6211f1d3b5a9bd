"""What `/v1/routing/capabilities` says of every control; what it names can go into requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    CAPABILITIES,
    EFFORT,
    GROUPED,
    HIDDEN,
    LAYERS,
    MOE,
    MOE_PROFILED,
    PROFILE,
    PROFILED,
    UNCHUNKED,
    changed,
    depth,
    policy,
    refused,
)
from support.full_profile import ADAPTER, MEASURED, frontier, level

from sluice.models.depth.parameters import Number
from sluice.models.depth.registry import adaptive_methods, offered_exits
from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.schema import ExpertFields, RemixFields
from sluice.server.http.listing import capabilities_listing

LEVELS = [level(0.75, (5,), (4, 5)), level(0.5, (3, 4, 5), (3, 4, 5))]
RATIOS = (0.0, 0.5, 0.25, 0.125, 0.5, 1.0)
FOUND = replace(
    MOE,
    profile=changed(
        PROFILE,
        behaviours={
            "refusal": {
                "experts": ((3, 7), (0, 1)),
                "scores": (0.5, 0.25),
                "measure": "weight",
                "prompts": (9, 8),
            }
        },
        skip_sets={"a": {"attention": (1, 4), "mlp": (2,), "quality": 0.99, "seconds": 0.75}},
        adapters={"b": {**ADAPTER, "attention": (1, 4)}},
        expert_k=[{"budget": 9, "top_k": (1, 1, 2, 2, 2, 2), "divergence": 0.5}],
        skip_ratios=RATIOS,
        frontier=frontier(effort=LEVELS),
    ),
)


def listed(kind: str, capabilities: Capabilities = CAPABILITIES) -> dict[str, Any]:
    found: dict[str, Any] = capabilities_listing(capabilities)["depth"][kind]
    return found


@pytest.mark.parametrize(
    ("kind", "methods"), [("exit", offered_exits()), ("adaptive", adaptive_methods())]
)
def test_every_method_with_its_parameters_and_source(kind: str, methods: dict[str, Any]) -> None:
    found = listed(kind)
    assert {*found} == {*methods}
    for name, method in methods.items():
        entry = found[name]
        assert entry["source"] == method.source
        assert entry["description"] == method.description
        assert len(method.description) <= 60
        assert {key: part for key, part in entry["parameters"].items() if key != "retention"} == {
            key: {"low": p.low, "high": p.high, "default": p.default, "integer": p.integer}
            for key, p in method.parameters.items()
            if isinstance(p, Number)
        }
        assert entry["available"] == (not method.profile_tensors)
        assert (entry["reason"] is None) == entry["available"]
    assert all(entry["source"] for entry in found.values())


def test_an_exit_says_whether_it_decides_for_each_token() -> None:
    per_token = {name for name, entry in listed("exit").items() if entry["per_token"]}
    assert {*listed("exit")} - per_token == {"fixed"}


def test_a_profile_makes_its_methods_available() -> None:
    without, found = listed("exit"), listed("exit", PROFILED)
    assert "--profile" in without["classifier"]["reason"]
    assert found["classifier"]["available"]
    assert not found["q_exit"]["available"]
    assert "q_exit" in found["q_exit"]["reason"]
    assert listed("adaptive", PROFILED)["first"]["available"]


def test_what_hangs_on_the_engine() -> None:
    assert not listed("adaptive", PROFILED)["first"]["masked_prefill"]
    assert listed("adaptive", UNCHUNKED)["first"]["masked_prefill"]
    assert len(listed("adaptive")["mod"]["parameters"]["retention"]["default"]) == LAYERS
    assert listed("adaptive")["lac"]["modes"] == ["readout", "replace", "predict"]
    assert listed("skip")["by"] == ["block", "attention", "mlp", "joint"]
    assert [listed("skip", each)["order"] for each in (CAPABILITIES, PROFILED)] == [
        None,
        "profile",
    ]


def test_a_refused_engine_lists_nothing() -> None:
    wire = capabilities_listing(replace(CAPABILITIES, refusal="it is an OPT"))
    assert (wire["depth"], wire["effort"], wire["report"]) == ({}, {}, False)


def routing_of(capabilities: Capabilities) -> dict[str, Any]:
    found: dict[str, Any] = capabilities_listing(capabilities)["experts_routing"]
    return found


def test_behaviours_are_experts_to_deactivate() -> None:
    (name, found), *_ = routing_of(FOUND)["behaviours"].items()
    assert name == "refusal"
    assert found == {
        "experts": [[3, 7], [0, 1]],
        "scores": [0.5, 0.25],
        "measure": "weight",
        "prompts": [9, 8],
    }
    masked = [{"layer": layer, "experts": [expert]} for layer, expert in found["experts"]]
    asked = policy({"experts": {"deactivate": masked}}, FOUND).experts
    assert asked == ExpertPolicy(masked=((0, 1), (3, 7)))


def test_experts_per_layer_and_skip_ratios_go_into_a_request() -> None:
    listed = routing_of(FOUND)
    (found,) = listed["expert_k"]
    assert found == {"budget": 9, "top_k": [1, 1, 2, 2, 2, 2], "divergence": 0.5}
    asked = {"top_k": found["top_k"], "skip_ratio": listed["skip_ratios"]}
    resolved = policy({"experts": asked}, FOUND).experts
    assert resolved == ExpertPolicy(top_k=(1, 1, 2, 2, 2, 2), skip_ratio=RATIOS)


def test_skip_sets_go_into_a_request() -> None:
    found = capabilities_listing(FOUND)["depth"]["skip"]["sets"]
    assert found == {"a": {"attention": [1, 4], "mlp": [2], "quality": 0.99, "seconds": 0.75}}
    sets = {name: found["a"][name] for name in ("attention", "mlp")}
    expected = SkipSet.of(attention=(1, 4), mlp=(2,), phase=Phase.DECODE)
    assert policy(depth(skip=sets, phase="decode"), FOUND).skip == expected


def test_adapters_go_into_a_request() -> None:
    found = capabilities_listing(FOUND)["depth"]["skip"]["adapters"]
    assert found == {"b": {**ADAPTER, "attention": [1, 4], "mlp": [1], "layers": [1]}}
    expected = SkipSet.of(attention=(1, 4), mlp=(1,), phase=Phase.DECODE, adapter="b")
    (name,) = found
    assert policy(depth(skip={"adapter": name}), FOUND).skip == expected


def test_where_effort_comes_from() -> None:
    found = capabilities_listing(FOUND)["effort"]
    assert (found["source"], found["lowest"], found["measure"]) == ("frontier", 0.5, "exact match")
    assert found["levels"] == [
        {"effort": 0.75, "attention": [5], "mlp": [4, 5], "quality": MEASURED},
        {"effort": 0.5, "attention": [3, 4, 5], "mlp": [3, 4, 5], "quality": MEASURED},
    ]


@pytest.mark.parametrize(
    ("capabilities", "source"),
    [
        (FOUND, "frontier"),
        (PROFILED, "importance"),
        (replace(CAPABILITIES, profile=changed(PROFILE, frontier=frontier())), "importance"),
    ],
    ids=["frontier", "importance", "no levels"],
)
def test_the_lowest_effort_that_is_listed_can_be_asked(
    capabilities: Capabilities, source: str
) -> None:
    found = capabilities_listing(capabilities)["effort"]
    assert found["source"] == source
    skip = policy({"effort": found["lowest"]}, capabilities).skip
    assert 0 < len(skip.attention) < LAYERS
    if source != "frontier":
        assert found["levels"] == []
        assert len(skip.attention) == LAYERS - 1


@pytest.mark.parametrize(
    "capabilities",
    [CAPABILITIES, replace(CAPABILITIES, profile=changed(PROFILE, importance=None))],
    ids=["no profile", "no importance"],
)
def test_without_an_order_there_is_no_effort(capabilities: Capabilities) -> None:
    wire = capabilities_listing(capabilities)
    found, skip = wire["effort"], wire["depth"]["skip"]
    assert (found["available"], found["source"], skip["order"]) == (False, None, None)
    assert found["reason"] == skip["order_reason"]
    assert refused({"effort": 0.5}, capabilities) == (EFFORT, "needs_profile")
    assert policy({"effort": found["lowest"]}, capabilities) == RoutingPolicy()
    ordered = capabilities_listing(PROFILED)
    assert ordered["effort"]["available"]
    assert ordered["depth"]["skip"]["order_reason"] is None


def test_levels_without_importance_are_still_there() -> None:
    profile = changed(FOUND.profile or PROFILE, importance=None)
    capabilities = replace(FOUND, profile=profile)
    assert capabilities_listing(capabilities)["effort"]["available"]
    # Half way from full depth to the first level, which leaves out mlp 5 and 4, and attention 5.
    assert policy({"effort": 0.875}, capabilities).skip == SkipSet.of(
        attention=(5,), mlp=(5,), phase=Phase.DECODE, elastic=True
    )


def test_a_profile_without_all_that() -> None:
    for capabilities in (CAPABILITIES, PROFILED):
        listed = routing_of(capabilities)
        assert (listed["behaviours"], listed["expert_k"]) == ({}, [])
        assert listed["skip_ratios"] is None
        wire = capabilities_listing(capabilities)
        assert wire["hidden_size"] == HIDDEN
        assert wire["depth"]["skip"]["sets"] == {}


def test_what_can_be_asked_of_the_experts() -> None:
    found = routing_of(MOE_PROFILED)
    assert (found["supported"], found["reason"], found["enabled"]) == (True, None, True)
    assert found["layers"] == [0, 2, 3, 4, 5]
    assert (found["experts_per_layer"], found["top_k"], found["scoring"]) == (8, 3, "softmax")
    assert found["super_experts"] == [[0, 1], [3, 7]]
    assert found["references"]["tales"] == {"layers": [4, 5], "width": 3, "encoder": "sentences"}
    controls = found["controls"]
    assert {*controls} | {"mode"} == {*ExpertFields.model_fields}
    whole = {"low": 1, "high": 8, "default": 3, "integer": True}
    assert controls["top_k"]["parameters"]["top_k"] == whole
    assert controls["budget"]["oea"]["parameters"]["k0"]["high"] == 3
    remixed = controls["remix"]["kernel"]["parameters"]
    assert remixed["top"] == {"low": 3, "high": 8, "default": 8, "integer": True}
    assert remixed["alpha"]["integer"] is False
    entries = [*controls["budget"].values(), *controls["remix"].values()]
    entries += [entry for name, entry in controls.items() if name not in ("budget", "remix")]
    assert all(entry["source"] and entry["available"] for entry in entries)
    for entry in controls["remix"].values():
        assert {*entry["parameters"]} <= {*RemixFields.model_fields}


def test_groups_narrow_the_ranges() -> None:
    controls = routing_of(GROUPED)["controls"]
    assert controls["top_k"]["parameters"]["top_k"]["high"] == 8
    assert controls["contrast"]["parameters"]["weak_rank"]["high"] == 7


def test_what_hangs_on_the_profile_and_the_cache() -> None:
    controls = routing_of(replace(MOE, contrast_refusal="too small"))["controls"]
    assert [entry["available"] for entry in controls["remix"].values()] == [False, False, True]
    assert controls["contrast"]["reason"] == "too small"


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        (CAPABILITIES, "the model has no routed experts"),
        (replace(MOE, expert_refusal="one kernel does it all"), "one kernel does it all"),
        (replace(MOE, refusal="it is an OPT"), "it is an OPT"),
    ],
)
def test_no_controls_where_there_are_none(capabilities: Capabilities, reason: str) -> None:
    found = routing_of(capabilities)
    assert (found["supported"], found["reason"], found["controls"]) == (False, reason, {})


def test_the_server_may_keep_experts_to_itself() -> None:
    found = routing_of(replace(MOE, expert_routing=False))
    assert (found["supported"], found["enabled"]) == (True, False)
