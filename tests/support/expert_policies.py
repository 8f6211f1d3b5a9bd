"""Expert policies that need no profile, by what becomes of their K/V."""

from __future__ import annotations

import random

from support.tiny import VOCABULARY

from sluice.models.policy.experts import (
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.policy.policy import RoutingPolicy

PLACES = (2, 3, 4, 5)
"""Layers with experts in every tiny model."""
EXPERTS = 8


def routed(**controls: object) -> RoutingPolicy:
    """A policy of expert controls alone."""
    return RoutingPolicy(experts=ExpertPolicy(**controls))


def remixed(scope: RemixScope, layers: tuple[int, ...] = (2, 4)) -> RoutingPolicy:
    """Half of another distribution, drawn once."""
    rng = random.Random(11)
    pathway = tuple(tuple(rng.random() ** 3 for _ in range(EXPERTS)) for _ in layers)
    remix = Remix(RemixMethod.SUPPLIED, scope, 0.1, layers, EXPERTS, pathway=pathway)
    return routed(remix=remix)


def masking(*experts: int) -> RoutingPolicy:
    """These experts are out everywhere."""
    return routed(masked=tuple((layer, e) for layer in PLACES for e in experts))


MASK, OTHER_MASK = masking(0, 3), masking(1, 5)
DROP = routed(dropped=tuple((layer, 2) for layer in PLACES))
FORCED = routed(forced=tuple((layer, 6, None) for layer in PLACES))
BIAS = routed(bias=tuple((layer, 4, 0.3) for layer in PLACES))
TOP_1, TOP_4 = routed(top_k=1), routed(top_k=4)
CUT = routed(top_k=4, top_p=0.5, skip_ratio=0.3)
PROMPT_CHANGING = {
    "mask": MASK,
    "drop": DROP,
    "forced": FORCED,
    "bias": BIAS,
    "top_k 1": TOP_1,
    "top_k 4": TOP_4,
    "cut": CUT,
}

LAST, DECODE = remixed(RemixScope.LAST), remixed(RemixScope.DECODE)
OEA = routed(budget=ExpertBudget(BudgetMethod.OEA, k0=1))
XSHARE = routed(budget=ExpertBudget(BudgetMethod.XSHARE, experts=2))
CONTRAST = routed(contrast=Contrast(weak_rank=1, beta=0.5, alpha=0.1))
FAR_CONTRAST = routed(contrast=Contrast(weak_rank=3, beta=2.0, alpha=0.01))

EVERYTHING: dict[str, RoutingPolicy | None] = {
    **PROMPT_CHANGING,
    "remix, last": LAST,
    "remix, decode": DECODE,
    "contrast": CONTRAST,
    "contrast, far": FAR_CONTRAST,
    "stock": None,
}
"""Without budgets, whose tokens depend on the neighbours."""


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]
