"""`routing.experts.remix`: what it becomes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import (
    DENSE_LAYER,
    EXPERT_PROFILE,
    EXPERTS,
    GROUPED,
    HIDDEN,
    LAYERS,
    MOE,
    MOE_PROFILED,
    PLAIN_SHAPE,
    changed,
    expert_policy,
    experts,
    policy,
    refused,
)

from sluice.models.policy.experts import STOCK_EXPERTS, ExpertPolicy, Remix, RemixMethod, RemixScope
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.routing.errors import RoutingError

Fields = dict[str, Any]
REMIX = f"{EXPERTS}.remix"
INVALID, NO_LAYER, NO_PROFILE = "invalid_field", "layer_out_of_range", "needs_profile"
EVEN = [0.125] * 8
TILTED = [0.5, 0.5, 0, 0, 0, 0, 0, 0]
SUPPLIED = Remix(
    RemixMethod.SUPPLIED, RemixScope.LAST, 0.5, (2, 4), 8, pathway=(tuple(EVEN), tuple(TILTED))
)


def remix(method: str, **fields: Any) -> Fields:
    return {"remix": {"method": method, **fields}}


def supplied(*rows: Any, **fields: Any) -> Fields:
    return remix("supplied", layers=[*range(2, 2 + len(rows))], pathway=[*rows], **fields)


GOOD: dict[str, tuple[Fields, ExpertPolicy]] = {
    "a supplied pathway": (
        {"remix": {"method": "supplied", "layers": [2, 4], "pathway": [EVEN, TILTED]}},
        ExpertPolicy(remix=SUPPLIED),
    ),
    "the rows follow their layers": (
        {"remix": {"method": "supplied", "layers": [4, 2], "pathway": [TILTED, EVEN]}},
        ExpertPolicy(remix=SUPPLIED),
    ),
    "a pathway for the last five": (
        {
            "remix": {
                "method": "supplied",
                "pathway": [EVEN] * 5,
                "scope": "decode",
                "alpha": 0,
                "top": 3,
            }
        },
        ExpertPolicy(
            remix=Remix(
                RemixMethod.SUPPLIED,
                RemixScope.DECODE,
                0.0,
                (0, 2, 3, 4, 5),
                3,
                pathway=(tuple(EVEN),) * 5,
            )
        ),
    ),
    "a pathway without a share": (
        {"remix": {"method": "supplied", "alpha": 1, "pathway": [EVEN] * 5}},
        STOCK_EXPERTS,
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_resolved(name: str) -> None:
    fields, expected = GOOD[name]
    resolved = policy(experts(**fields), MOE)
    assert resolved == RoutingPolicy(experts=expected)
    assert RoutingPolicy.from_dict(resolved.to_dict()) == resolved


NEIGHBOURHOOD = Remix(
    RemixMethod.KERNEL,
    RemixScope.LAST,
    0.5,
    (2, 4, 5),
    8,
    references="sums",
    neighbors=3,
    kernel="gaussian",
    bandwidth=0.5,
    max_similarity=0.95,
)

PROFILE_GOOD: dict[str, tuple[dict[str, Any], Remix]] = {
    "kernel regression": ({"method": "kernel", "references": "sums"}, NEIGHBOURHOOD),
    "an embedding although the model has one": (
        {"method": "kernel", "references": "sums", "embedding": [1, *[0.5] * (HIDDEN - 1)]},
        replace(NEIGHBOURHOOD, embedding=(1.0, *[0.5] * (HIDDEN - 1))),
    ),
    "another encoder": (
        {"method": "kernel", "references": "tales", "embedding": [0, -1, 2.5]},
        replace(NEIGHBOURHOOD, layers=(4, 5), references="tales", embedding=(0.0, -1.0, 2.5)),
    ),
    "cosine weights": (
        {
            "method": "kernel",
            "references": "sums",
            "kernel": "cosine",
            "neighbors": 1,
            "max_similarity": 1,
        },
        replace(NEIGHBOURHOOD, kernel="cosine", bandwidth=None, neighbors=1, max_similarity=1.0),
    ),
    "some of the layers": (
        {"method": "kernel", "references": "sums", "layers": [5, 2], "bandwidth": 2},
        replace(NEIGHBOURHOOD, layers=(2, 5), bandwidth=2.0),
    ),
    "mode finding": (
        {"method": "mode", "references": "tales", "bandwidth": 0.1, "scope": "decode"},
        replace(
            NEIGHBOURHOOD,
            method=RemixMethod.MODE,
            scope=RemixScope.DECODE,
            layers=(4, 5),
            references="tales",
            bandwidth=0.1,
            max_similarity=None,
        ),
    ),
}


@pytest.mark.parametrize("name", PROFILE_GOOD)
def test_resolved_with_references(name: str) -> None:
    fields, expected = PROFILE_GOOD[name]
    resolved = policy(experts(remix=fields), MOE_PROFILED)
    assert resolved == RoutingPolicy(experts=ExpertPolicy(remix=expected))
    assert RoutingPolicy.from_dict(resolved.to_dict()) == resolved


def test_the_only_reference_set_needs_no_name() -> None:
    only = {"sums": EXPERT_PROFILE.references["sums"]}
    capabilities = replace(MOE, profile=changed(EXPERT_PROFILE, references=only))
    assert expert_policy(capabilities, remix={"method": "kernel"}).remix == NEIGHBOURHOOD


def test_experts_that_take_part_in_a_re_mix_by_default() -> None:
    wide = replace(MOE, expert_shape=replace(PLAIN_SHAPE, experts=64))
    supplied = {"method": "supplied", "pathway": [[1] * 64] * 5}
    for fields, top in (({}, 20), ({"top_k": 32}, 32), ({"top_k": [8, 1, 24, 8, 8, 8]}, 24)):
        remix = expert_policy(wide, remix=supplied, **fields).remix
        assert remix is not None
        assert remix.top == top


def test_a_pathway_without_layers_is_for_the_last_five_with_experts() -> None:
    supplied = {"method": "supplied", "pathway": [[1] * 16] * 5}
    remix = expert_policy(GROUPED, remix=supplied).remix
    assert remix is not None
    assert remix.layers == tuple(range(LAYERS - 5, LAYERS))


BAD: dict[str, tuple[Fields, str, str]] = {
    "remix without method": ({"remix": {}}, f"{REMIX}.method", INVALID),
    "unknown remix": (remix("gradient"), f"{REMIX}.method", INVALID),
    "no pathway": (remix("supplied"), f"{REMIX}.pathway", INVALID),
    "pathway for fewer layers": (
        remix("supplied", pathway=[EVEN] * 4),
        f"{REMIX}.pathway",
        INVALID,
    ),
    "pathway for fewer experts": (supplied(EVEN, EVEN[1:]), f"{REMIX}.pathway.1", INVALID),
    "negative probability": (
        supplied([-0.5, 1, 1, 1, 1, 1, 1, 1]),
        f"{REMIX}.pathway.0.0",
        INVALID,
    ),
    "infinite probability": (
        supplied(EVEN, [*EVEN[1:], float("inf")]),
        f"{REMIX}.pathway.1.7",
        INVALID,
    ),
    "probability beyond fp32": (supplied([*EVEN[1:], 1e39]), f"{REMIX}.pathway.0.7", INVALID),
    "a row of zeros": (supplied(EVEN, [0] * 8), f"{REMIX}.pathway.1", INVALID),
    "alpha over 1": (supplied(EVEN, alpha=1.5), f"{REMIX}.alpha", INVALID),
    "negative alpha": (supplied(EVEN, alpha=-0.5), f"{REMIX}.alpha", INVALID),
    "unknown scope": (supplied(EVEN, scope="prompt"), f"{REMIX}.scope", INVALID),
    "fewer take part than are chosen": (supplied(EVEN, top=2), f"{REMIX}.top", INVALID),
    "more take part than there are": (supplied(EVEN, top=9), f"{REMIX}.top", INVALID),
    "fewer take part than are asked for": (
        {**supplied(EVEN, top=4), "top_k": 5},
        f"{REMIX}.top",
        INVALID,
    ),
    "remix nowhere": (remix("supplied", layers=[], pathway=[]), f"{REMIX}.layers", INVALID),
    "remix in no layer": (
        remix("supplied", layers=[LAYERS], pathway=[EVEN]),
        f"{REMIX}.layers.0",
        NO_LAYER,
    ),
    "remix in a dense layer": (
        remix("supplied", layers=[0, DENSE_LAYER], pathway=[EVEN] * 2),
        f"{REMIX}.layers.1",
        INVALID,
    ),
    "remix in a layer twice": (
        remix("supplied", layers=[2, 3, 2], pathway=[EVEN] * 3),
        f"{REMIX}.layers.2",
        INVALID,
    ),
    **{
        f"supplied with {name}": (supplied(EVEN, **{name: value}), f"{REMIX}.{name}", INVALID)
        for name, value in {
            "references": "sums",
            "neighbors": 3,
            "kernel": "gaussian",
            "bandwidth": 0.5,
            "max_similarity": 0.5,
            "embedding": [1.0] * HIDDEN,
        }.items()
    },
    "a pathway that changes nothing is checked": (
        remix("supplied", alpha=1, pathway=[EVEN] * 4),
        f"{REMIX}.pathway",
        INVALID,
    ),
    "no references": (remix("kernel", references="sums"), f"{REMIX}.method", NO_PROFILE),
    "no references to find modes in": (remix("mode"), f"{REMIX}.method", NO_PROFILE),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    fields, *expected = BAD[name]
    assert [*refused(experts(**fields), MOE)] == expected


PROFILE_BAD: dict[str, tuple[Fields, str, str]] = {
    "several sets and no name": (remix("kernel"), f"{REMIX}.references", INVALID),
    "no such set": (remix("mode", references="songs"), f"{REMIX}.references", INVALID),
    "a layer that the set does not hold": (
        remix("kernel", references="sums", layers=[2, 3]),
        f"{REMIX}.layers.1",
        INVALID,
    ),
    "a dense layer for the set": (
        remix("mode", references="sums", layers=[DENSE_LAYER]),
        f"{REMIX}.layers.0",
        INVALID,
    ),
    "an embedding for another encoder": (
        remix("kernel", references="tales"),
        f"{REMIX}.embedding",
        INVALID,
    ),
    "an embedding of another width": (
        remix("kernel", references="tales", embedding=[1, 2]),
        f"{REMIX}.embedding",
        INVALID,
    ),
    "text in an embedding": (
        remix("kernel", references="tales", embedding=[1, "2", 3]),
        f"{REMIX}.embedding.1",
        INVALID,
    ),
    "an embedding beyond fp32": (
        remix("kernel", references="tales", embedding=[1, 2, 1e39]),
        f"{REMIX}.embedding.2",
        INVALID,
    ),
    "no neighbours": (
        remix("kernel", references="sums", neighbors=0),
        f"{REMIX}.neighbors",
        INVALID,
    ),
    "unknown kernel": (
        remix("kernel", references="sums", kernel="linear"),
        f"{REMIX}.kernel",
        INVALID,
    ),
    "no bandwidth": (
        remix("mode", references="sums", bandwidth=0),
        f"{REMIX}.bandwidth",
        INVALID,
    ),
    "bandwidth of a cosine": (
        remix("kernel", references="sums", kernel="cosine", bandwidth=1),
        f"{REMIX}.bandwidth",
        INVALID,
    ),
    "no similarity": (
        remix("kernel", references="sums", max_similarity=0),
        f"{REMIX}.max_similarity",
        INVALID,
    ),
    "too much similarity": (
        remix("kernel", references="sums", max_similarity=1.5),
        f"{REMIX}.max_similarity",
        INVALID,
    ),
    "kernel with a pathway": (
        remix("kernel", references="sums", pathway=[EVEN] * 3),
        f"{REMIX}.pathway",
        INVALID,
    ),
    **{
        f"mode with {name}": (
            remix("mode", references="sums", **{name: value}),
            f"{REMIX}.{name}",
            INVALID,
        )
        for name, value in {
            "max_similarity": 0.5,
            "embedding": [1] * HIDDEN,
            "pathway": [EVEN] * 3,
        }.items()
    },
}


@pytest.mark.parametrize("name", PROFILE_BAD)
def test_refused_with_references(name: str) -> None:
    fields, *expected = PROFILE_BAD[name]
    assert [*refused(experts(**fields), MOE_PROFILED)] == expected


def test_the_encoder_is_named() -> None:
    with pytest.raises(RoutingError, match=r"'sentences'.* 3 numbers"):
        policy(experts(**remix("kernel", references="tales")), MOE_PROFILED)


def test_references_of_a_profile_without_any() -> None:
    bare = replace(MOE, profile=changed(EXPERT_PROFILE, references={}))
    assert refused(experts(**remix("kernel")), bare) == (f"{REMIX}.method", NO_PROFILE)
