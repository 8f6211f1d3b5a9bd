"""Every rule of `routing.experts` that refuses: with which field and for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    CAPABILITIES,
    DENSE_LAYER,
    EXPERTS,
    GROUPED,
    HUGE,
    LAYERS,
    MOE,
    MOE_PROFILED,
    experts,
    named,
    policy,
    refused,
)

from sluice.models.routing.errors import REASONS, RoutingError

DEACTIVATE, ACTIVATE, BIAS, TOP_K, SKIP_RATIO, BUDGET = (
    f"{EXPERTS}.{name}"
    for name in (
        "deactivate",
        "activate",
        "bias",
        "top_k",
        "skip_ratio",
        "budget",
    )
)
INVALID, NO_LAYER, NO_EXPERT = "invalid_field", "layer_out_of_range", "expert_out_of_range"
TOO_FEW, COMBINATION = "too_few_experts", "unsupported_combination"
PROTECTED = "protected_expert"

Fields = dict[str, Any]


def off(*entries: Fields, **more: Any) -> Fields:
    return {"deactivate": [*entries], **more}


def entry(layer: Any, *ids: Any, **more: Any) -> Fields:
    return named(layer, *ids, **more)[0]


def biased(*entries: tuple[Any, Any, Any]) -> Fields:
    return {"bias": [{"layer": la, "expert": e, "value": v} for la, e, v in entries]}


def budget(method: str, **fields: Any) -> Fields:
    return {"budget": {"method": method, **fields}}


BAD: dict[str, tuple[Fields, str, str]] = {
    # strict fields
    "unknown control": ({"temperature": 1}, f"{EXPERTS}.temperature", INVALID),
    "unknown key of an entry": (
        off({"layer": 0, "experts": [1], "weight": 1}),
        f"{DEACTIVATE}.0.weight",
        INVALID,
    ),
    "an entry without experts": (off({"layer": 0}), f"{DEACTIVATE}.0.experts", INVALID),
    "no list of entries": ({"deactivate": {"layer": 0}}, DEACTIVATE, INVALID),
    "text for a layer": (off(entry("0", 1)), f"{DEACTIVATE}.0.layer", INVALID),
    "text for an expert": (off(entry(0, 1, "2")), f"{DEACTIVATE}.0.experts.1", INVALID),
    "truth for an expert": (off(entry(0, True)), f"{DEACTIVATE}.0.experts.0", INVALID),
    "half an expert": ({"activate": named(0, 1.5)}, f"{ACTIVATE}.0.experts.0", INVALID),
    "unknown mode": (off(entry(0, 1), mode="zero"), f"{EXPERTS}.mode", INVALID),
    "protection as text": (
        {"protect_super_experts": "no"},
        f"{EXPERTS}.protect_super_experts",
        INVALID,
    ),
    # deactivate
    "a layer that is not there": (off(entry(LAYERS, 1)), f"{DEACTIVATE}.0.layer", NO_LAYER),
    "a negative layer": (off(entry(0, 1), entry(-1, 1)), f"{DEACTIVATE}.1.layer", NO_LAYER),
    "a huge layer": (off(entry(HUGE, 1)), f"{DEACTIVATE}.0.layer", NO_LAYER),
    "a dense layer": (off(entry(DENSE_LAYER, 1)), f"{DEACTIVATE}.0.layer", INVALID),
    "a dense layer without experts": (off(entry(DENSE_LAYER)), f"{DEACTIVATE}.0.layer", INVALID),
    "an expert that is not there": (off(entry(0, 1, 8)), f"{DEACTIVATE}.0.experts.1", NO_EXPERT),
    "a negative expert": (off(entry(0, -1)), f"{DEACTIVATE}.0.experts.0", NO_EXPERT),
    "an expert twice": (off(entry(0, 1, 2, 1)), f"{DEACTIVATE}.0.experts.2", INVALID),
    "an expert twice, in two entries": (
        off(entry(0, 1), entry(2, 1), entry(0, 3, 1)),
        f"{DEACTIVATE}.2.experts.1",
        INVALID,
    ),
    "mode alone": ({"mode": "mask"}, f"{EXPERTS}.mode", INVALID),
    "mode beside a null": (
        {"mode": "drop", "deactivate": None, "top_k": 2},
        f"{EXPERTS}.mode",
        INVALID,
    ),
    "too many masked": (
        off(entry(3), entry(2, 0), entry(3, 0, 1), entry(3, 2, 3, 4, 5)),
        f"{DEACTIVATE}.2",
        TOO_FEW,
    ),
    "all masked": (off(entry(2, *range(8))), f"{DEACTIVATE}.0", TOO_FEW),
    "too many masked for more experts per token": (
        off(entry(2, 0), entry(3, 0, 1), top_k=[3, 3, 3, 7, 3, 3]),
        f"{DEACTIVATE}.1",
        TOO_FEW,
    ),
    "all dropped": (off(entry(2, 0, 1, 2), mode="drop"), f"{DEACTIVATE}.0", TOO_FEW),
    "all of fewer dropped": (
        off(entry(2, 0), mode="drop", top_k=[3, 3, 1, 3, 3, 3]),
        f"{DEACTIVATE}.0",
        TOO_FEW,
    ),
    "dropped beyond the leading choices": (
        off(entry(2, 0, 1), mode="drop", **budget("oea", k0=2)),
        f"{DEACTIVATE}.0",
        TOO_FEW,
    ),
    "dropped from a shared set": (
        off(entry(2, 0), mode="drop", **budget("xshare", experts=4)),
        f"{DEACTIVATE}.0",
        TOO_FEW,
    ),
    # activate
    "no layer to activate in": ({"activate": named(LAYERS, 1)}, f"{ACTIVATE}.0.layer", NO_LAYER),
    "activated in a dense layer": (
        {"activate": named(DENSE_LAYER, 1)},
        f"{ACTIVATE}.0.layer",
        INVALID,
    ),
    "no expert to activate": ({"activate": named(2, 9)}, f"{ACTIVATE}.0.experts.0", NO_EXPERT),
    "activated twice": (
        {"activate": [*named(2, 1), *named(2, 1, weight=1)]},
        f"{ACTIVATE}.1.experts.0",
        INVALID,
    ),
    "activated and deactivated": (
        off(entry(2, 1), activate=named(2, 0, 1)),
        f"{ACTIVATE}.0.experts.1",
        COMBINATION,
    ),
    "activated and dropped": (
        off(entry(2, 1), activate=named(2, 1), mode="drop"),
        f"{ACTIVATE}.0.experts.0",
        COMBINATION,
    ),
    "more activated than a token has": (
        {"activate": [*named(0, 1), *named(2, 0, 1), *named(2, 2, 3)]},
        f"{ACTIVATE}.1",
        INVALID,
    ),
    "more activated than asked for": (
        {"activate": named(2, 0, 1), "top_k": 1},
        f"{ACTIVATE}.0",
        INVALID,
    ),
    "weight 0": ({"activate": named(2, 0, weight=0)}, f"{ACTIVATE}.0.weight", INVALID),
    "negative weight": ({"activate": named(2, 0, weight=-1)}, f"{ACTIVATE}.0.weight", INVALID),
    "weight beyond fp32": (
        {"activate": named(2, 0, weight=1e39)},
        f"{ACTIVATE}.0.weight",
        INVALID,
    ),
    "weight is a truth": ({"activate": named(2, 0, weight=True)}, f"{ACTIVATE}.0.weight", INVALID),
    # bias
    "biased in no layer": (biased((-1, 0, 1)), f"{BIAS}.0.layer", NO_LAYER),
    "biased in a dense layer": (biased((DENSE_LAYER, 0, 1)), f"{BIAS}.0.layer", INVALID),
    "no expert to bias": (biased((0, 0, 1), (2, 8, 1)), f"{BIAS}.1.expert", NO_EXPERT),
    "biased twice": (biased((2, 1, 1), (2, 1, 0)), f"{BIAS}.1.expert", INVALID),
    "a bias of zero first": (biased((2, 1, 0), (2, 1, 1)), f"{BIAS}.1.expert", INVALID),
    "infinite bias": (biased((2, 1, float("inf"))), f"{BIAS}.0.value", INVALID),
    "bias beyond fp32": (biased((2, 1, -1e39)), f"{BIAS}.0.value", INVALID),
    "bias as text": (biased((2, 1, "1")), f"{BIAS}.0.value", INVALID),
    # top_k, top_p, skip_ratio
    "top_k 0": ({"top_k": 0}, TOP_K, INVALID),
    "top_k over all": ({"top_k": 9}, TOP_K, INVALID),
    "huge top_k": ({"top_k": HUGE}, TOP_K, INVALID),
    "half a top_k": ({"top_k": 1.5}, TOP_K, INVALID),
    "top_k as text": ({"top_k": "2"}, TOP_K, INVALID),
    "top_k is a truth": ({"top_k": True}, TOP_K, INVALID),
    "top_k by name": ({"top_k": {"0": 2}}, TOP_K, INVALID),
    "no top_k": ({"top_k": []}, TOP_K, INVALID),
    "top_k for some layers": ({"top_k": [2] * (LAYERS - 1)}, TOP_K, INVALID),
    "top_k 0 in a layer": ({"top_k": [2, 2, 0, 2, 2, 2]}, f"{TOP_K}.2", INVALID),
    "top_k 0 in the dense layer": ({"top_k": [2, 0, 2, 2, 2, 2]}, f"{TOP_K}.1", INVALID),
    "top_k over all in a layer": ({"top_k": [2, 2, 2, 2, 2, 9]}, f"{TOP_K}.5", INVALID),
    "text in a top_k list": ({"top_k": [2, "2", 2, 2, 2, 2]}, f"{TOP_K}.1", INVALID),
    "top_p 0": ({"top_p": 0}, f"{EXPERTS}.top_p", INVALID),
    "top_p over 1": ({"top_p": 1.01}, f"{EXPERTS}.top_p", INVALID),
    "top_p is a list": ({"top_p": [0.5] * LAYERS}, f"{EXPERTS}.top_p", INVALID),
    "negative ratio": ({"skip_ratio": -0.1}, SKIP_RATIO, INVALID),
    "ratio over 1": ({"skip_ratio": 1.1}, SKIP_RATIO, INVALID),
    "ratio is no number": ({"skip_ratio": float("nan")}, SKIP_RATIO, INVALID),
    "no ratios": ({"skip_ratio": []}, SKIP_RATIO, INVALID),
    "ratios for too many layers": ({"skip_ratio": [0.1] * 7}, SKIP_RATIO, INVALID),
    "a ratio over 1 in a layer": ({"skip_ratio": [0, 0, 0, 2, 0, 0]}, f"{SKIP_RATIO}.3", INVALID),
    "no number in a list of ratios": (
        {"skip_ratio": [0, float("inf"), 0, 0, 0, 0]},
        f"{SKIP_RATIO}.1",
        INVALID,
    ),
    # budget
    "budget without method": ({"budget": {}}, f"{BUDGET}.method", INVALID),
    "unknown budget": (budget("first"), f"{BUDGET}.method", INVALID),
    "oea without k0": (budget("oea"), f"{BUDGET}.k0", INVALID),
    "oea with experts": (budget("oea", k0=1, experts=4), f"{BUDGET}.experts", INVALID),
    "k0 0": (budget("oea", k0=0), f"{BUDGET}.k0", INVALID),
    "k0 over top_k": (budget("oea", k0=4), f"{BUDGET}.k0", INVALID),
    "k0 over the least top_k": (
        {**budget("oea", k0=2), "top_k": [3, 3, 3, 1, 3, 3]},
        f"{BUDGET}.k0",
        INVALID,
    ),
    "xshare without experts": (budget("xshare"), f"{BUDGET}.experts", INVALID),
    "xshare with k0": (budget("xshare", experts=2, k0=1), f"{BUDGET}.k0", INVALID),
    "lynx for no experts": (budget("lynx", experts=0), f"{BUDGET}.experts", INVALID),
    "lynx for too many": (budget("lynx", experts=9), f"{BUDGET}.experts", INVALID),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    fields, *expected = BAD[name]
    assert [*refused(experts(**fields), MOE)] == expected


def test_every_reason_is_a_label() -> None:
    assert {reason for _, _, reason in BAD.values()} < {*REASONS}


PROTECTED_BAD: dict[str, tuple[Fields, str, str]] = {
    "a super expert masked": (
        off(entry(2, 0), entry(3, 6, 7)),
        f"{DEACTIVATE}.1.experts.1",
        PROTECTED,
    ),
    "a super expert dropped": (
        off(entry(0, 1), mode="drop"),
        f"{DEACTIVATE}.0.experts.0",
        PROTECTED,
    ),
    "a super expert held back": (
        biased((0, 1, 0.5), (3, 7, -0.5)),
        f"{BIAS}.1.value",
        PROTECTED,
    ),
    "protected by name": (
        off(entry(3, 7), protect_super_experts=True),
        f"{DEACTIVATE}.0.experts.0",
        PROTECTED,
    ),
}


@pytest.mark.parametrize("name", PROTECTED_BAD)
def test_super_experts_stay(name: str) -> None:
    fields, *expected = PROTECTED_BAD[name]
    assert [*refused(experts(**fields), MOE_PROFILED)] == expected


GROUPS_BAD: dict[str, tuple[Fields, str, str]] = {
    "three groups gone": (off(entry(2, *range(12))), f"{DEACTIVATE}.0", TOO_FEW),
    "one live expert makes no group under a correction": (
        off(entry(2, 0, 1, 2, 4, 5, 6, 8, 9, 10), top_k=1),
        f"{DEACTIVATE}.0",
        TOO_FEW,
    ),
    "the two emptiest groups have too few": (
        off(entry(2, 0), entry(1, 0, 1, 4, 5, 8), top_k=5),
        f"{DEACTIVATE}.1",
        TOO_FEW,
    ),
    "a forced expert takes the slot of a fuller group": (
        off(entry(2, 1, 2, 3, 4, 5), activate=named(2, 0)),
        f"{DEACTIVATE}.0",
        TOO_FEW,
    ),
    "activated in three groups": (
        {"activate": [*named(2, 0, 4), *named(2, 8)]},
        f"{ACTIVATE}.0",
        INVALID,
    ),
    "top_k over two groups": ({"top_k": 9}, TOP_K, INVALID),
}


@pytest.mark.parametrize("name", GROUPS_BAD)
def test_refused_with_groups(name: str) -> None:
    fields, *expected = GROUPS_BAD[name]
    assert [*refused(experts(**fields), GROUPED)] == expected


@pytest.mark.parametrize(
    ("refusal", "capabilities", "param"),
    [
        ("the model has no routed experts", CAPABILITIES, EXPERTS),
        ("one kernel does it all", replace(MOE, expert_refusal="one kernel does it all"), EXPERTS),
        ("it is an OPT", replace(MOE, refusal="it is an OPT"), "routing"),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [{"top_k": 3}, {"skip_ratio": 0}, {"mode": "mask"}, off(entry(99)), {"top_k": []}],
)
def test_an_engine_without_expert_controls_says_why(
    refusal: str, capabilities: Any, param: str, fields: Fields
) -> None:
    with pytest.raises(RoutingError, match=refusal) as caught:
        policy(experts(**fields), capabilities)
    assert (caught.value.param, caught.value.reason) == (param, "unsupported_model")
