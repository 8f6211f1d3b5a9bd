"""Which experts one token runs in one layer, and with which weights: the rules, one at a time.

A score is a list of one number per expert. Ties go to the lower expert everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sluice.models.policy.experts import ExpertId, ExpertPolicy

GONE = -math.inf
"""Selection score of an expert that cannot be selected."""

TIE = 2e-6
"""Margin up to which fp32 arithmetic in another order may decide otherwise; see `Route.margin`."""


@dataclass(frozen=True)
class Router:
    """A stock router.

    Attributes:
        top_k: experts per token.
        sigmoid: scores are the sigmoid of the logits instead of their softmax.
        renormalize: the selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups; 1 where selection is not limited by group.
        topk_group: groups that a token may choose from.
        correction: the correction bias, one number per expert, or None.
    """

    top_k: int
    sigmoid: bool = False
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1
    correction: tuple[float, ...] | None = None

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of router logits, (..., experts), fp32."""
        logits = logits.float()
        return logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)


@dataclass(frozen=True)
class Asked:
    """What a policy asks of one layer; by default nothing.

    Attributes:
        masked: experts that are not selected.
        dropped: experts taken out of what was selected.
        forced: experts always selected, with a weight or None.
        bias: added to selection scores.
        top_k: experts per token, or None.
        skip_ratio: a rank below this share of the first one's score is dropped, or None.
        top_p: share of the score that the ranks before one may hold, or None.
        protected: experts that a row keeps if the untouched router selects them.
    """

    masked: Collection[int] = ()
    dropped: Collection[int] = ()
    forced: Mapping[int, float | None] = field(default_factory=dict)
    bias: Mapping[int, float] = field(default_factory=dict)
    top_k: int | None = None
    skip_ratio: float | None = None
    top_p: float | None = None
    protected: Collection[int] = ()

    @classmethod
    def of(cls, experts: ExpertPolicy, layer: int, super_experts: Collection[ExpertId]) -> Asked:
        """The part of `experts` that concerns a layer, and the layer's super experts."""

        def here(pairs: Collection[ExpertId]) -> frozenset[int]:
            return frozenset(expert for each, expert in pairs if each == layer)

        top_k, ratio = experts.top_k, experts.skip_ratio
        asked = cls(
            masked=here(experts.masked),
            dropped=here(experts.dropped),
            forced={expert: weight for each, expert, weight in experts.forced if each == layer},
            bias={expert: value for each, expert, value in experts.bias if each == layer},
            top_k=top_k[layer] if isinstance(top_k, tuple) else top_k,
            skip_ratio=ratio[layer] if isinstance(ratio, tuple) else ratio,
            top_p=experts.top_p,
            protected=here(super_experts) if experts.protect else frozenset(),
        )
        forbidden = {*asked.masked, *asked.dropped}
        assert not forbidden & {*asked.forced, *asked.protected}, "wanted and forbidden"
        return asked


NOTHING = Asked()


@dataclass(frozen=True)
class Route:
    """What a token runs in one layer.

    Attributes:
        weights: final weight of each selected expert, ascending by expert.
        margin: smallest distance of a score from the line that it was held against. A tiny one
            may fall the other way elsewhere.
    """

    weights: dict[int, float]
    margin: float = math.inf


def ordered(scores: Sequence[float]) -> list[int]:
    """Experts from best to worst, without those that cannot be selected."""
    alive = [expert for expert, score in enumerate(scores) if score > GONE]
    return sorted(alive, key=lambda expert: (-scores[expert], expert))


def choice_scores(scores: Sequence[float], router: Router, asked: Asked) -> list[float]:
    """Selection scores: correction, bias and masks, then the group limit."""
    summed = torch.tensor(scores)
    if router.correction is not None:
        summed = summed + torch.tensor(router.correction)
    for expert, value in asked.bias.items():
        summed[expert] += value
    for expert in asked.masked:
        summed[expert] = GONE
    choice: list[float] = summed.tolist()
    if router.groups == 1:
        return choice

    size = len(choice) // router.groups
    reach = []
    for group in range(router.groups):
        members = summed[group * size : (group + 1) * size].sort(descending=True).values
        best = members[:2].sum() if router.correction is not None else members[0]
        raised = any(expert // size == group for expert in asked.forced)
        reach.append(math.inf if raised else float(best))
    groups = sorted(range(router.groups), key=lambda group: (-reach[group], group))
    kept = groups[: router.topk_group]
    return [
        score if expert // size in kept or expert in asked.forced else GONE
        for expert, score in enumerate(choice)
    ]


def selected(choice: Sequence[float], top_k: int, forced: Collection[int] = ()) -> set[int]:
    """Forced experts, then the best others while there are slots."""
    assert len(forced) <= top_k, "more forced experts than slots"
    others = [expert for expert in ordered(choice) if expert not in forced]
    return {*forced, *others[: top_k - len(forced)]}


def stock_selection(scores: Sequence[float], router: Router) -> set[int]:
    """What the untouched router selects."""
    return selected(choice_scores(scores, router, NOTHING), router.top_k)


def cut(chosen: Collection[int], scores: Sequence[float], asked: Asked) -> tuple[list[int], float]:
    """What drops, `skip_ratio` and `top_p` leave of a selection, best first, and the margin."""
    ranks = sorted(chosen, key=lambda expert: (-scores[expert], expert))
    ranks = [expert for expert in ranks if expert not in asked.dropped]
    margin = math.inf
    if asked.skip_ratio is not None and ranks:
        least = asked.skip_ratio * scores[ranks[0]]
        free = [expert for expert in ranks if expert not in asked.forced]
        margin = min([margin, *(abs(scores[expert] - least) for expert in free)])
        ranks = [e for e in ranks if e in asked.forced or not scores[e] < least]
    if asked.top_p is not None:
        # Exact sums: no share of some exceeds that of all.
        total, kept = math.fsum(scores), []
        for rank, expert in enumerate(ranks):
            share = math.fsum(scores[each] for each in ranks[:rank]) / total
            if kept:
                margin = min(margin, abs(share - asked.top_p))
            if expert in asked.forced or share <= asked.top_p:
                kept.append(expert)
        ranks = kept
    return ranks, margin


def weighted(
    chosen: Collection[int], scores: Sequence[float], router: Router, asked: Asked
) -> dict[int, float]:
    """Final weights of a selection. All are 0 where they are renormalised and their sum is 0."""
    free = [scores[expert] for expert in chosen if expert not in asked.forced]
    weights = {}
    for expert in sorted(chosen):
        weights[expert] = scores[expert]
        if expert in asked.forced:
            given = asked.forced[expert]
            mean = sum(free) / len(free) if free else scores[expert]
            weights[expert] = mean if given is None else given
    total = sum(weights.values()) if router.renormalize else 1.0
    return {e: router.scale * weight / (total or 1.0) for e, weight in weights.items()}


def route(
    raw: Sequence[float],
    scores: Sequence[float],
    router: Router,
    asked: Asked,
    shared: Collection[int] | None = None,
) -> Route:
    """One token through one layer, all rules in order.

    Args:
        raw: scores as the router made them.
        scores: the same after re-mixing; equal to `raw` where nothing is re-mixed.
        router: the layer's router.
        asked: what the policy asks of the layer.
        shared: experts that a batch budget leaves the token, or None.
    """
    choice = choice_scores(scores, router, asked)
    protected = {*asked.protected} & stock_selection(raw, router)
    within = choice
    if shared is not None:
        open_to = {*shared, *protected}
        within = [c if expert in open_to else GONE for expert, c in enumerate(choice)]
    top_k = router.top_k if asked.top_k is None else asked.top_k
    chosen = selected(within, top_k, asked.forced)
    ranks, margin = cut(chosen, scores, asked)
    ranks += sorted(protected - {*ranks})
    return Route(
        weighted(ranks, scores, router, asked),
        min(margin, _gap(within, top_k, asked.forced)),
    )


def weak_route(scores: Sequence[float], router: Router, rank: int) -> Route:
    """The one expert at a rank, counted from 0, that a contrast's weak pass runs."""
    choice = choice_scores(scores, router, NOTHING)
    order = ordered(choice)
    margins = [choice[a] - choice[b] for a, b in pairwise(order[max(rank - 1, 0) : rank + 2])]
    return Route({order[rank]: router.scale}, min(margins, default=math.inf))


def _gap(choice: Sequence[float], top_k: int, forced: Collection[int]) -> float:
    """Between the last selected expert that had to compete and the first one left out."""
    others = [expert for expert in ordered(choice) if expert not in forced]
    slots = top_k - len(forced)
    if not 0 < slots < len(others):
        return math.inf
    return choice[others[slots - 1]] - choice[others[slots]]
