"""Router logits to scores, and to what top-k runs on.

The first half of a layer's order in design section 6: scores, re-mix, selection bias and mask,
group limit. `sluice.kernels.ops.route_topk` does all of it; batch budgets need the half way.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation
from sluice.kernels.ops.routing_args import FORCED, Group


def remix_scores(
    scores: torch.Tensor, reference: torch.Tensor, alpha: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """`alpha * scores + (1 - alpha) * reference` over each row's best experts, mass kept.

    Args:
        scores: fp32, (rows, experts), >= 0.
        reference: fp32, (rows, experts), >= 0, any mass; a row without mass among the experts
            that take part stays as it is.
        alpha: fp32, (rows,), in [0, 1].
        top: int64, (rows,): how many of the row's best experts take part.

    Returns:
        fp32, (rows, experts).
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(ranked)
    inside = torch.zeros_like(scores, dtype=torch.bool)
    inside.scatter_(1, ranked, places < top.unsqueeze(-1))
    mass = scores.masked_fill(~inside, 0.0).sum(-1, keepdim=True)
    pulled = reference.masked_fill(~inside, 0.0)
    weight = pulled.sum(-1, keepdim=True)
    # In this order: the reference may weigh so little that its inverse has no fp32.
    pulled = pulled / weight * mass
    share = alpha.unsqueeze(-1)
    return torch.where(inside & (weight > 0), share * scores + (1 - share) * pulled, scores)


_OUT = float("-inf")
_FIRST = float("inf")


def _fake(
    logits: torch.Tensor,
    rows: Group,
    shared: Group,
    table: Group,
    correction: torch.Tensor,
    sigmoid: bool,
    groups: int,
    topk_group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.new_empty(logits.shape, dtype=torch.float32)
    return scores, torch.empty_like(scores)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.route_topk:router_scores",
    triton="sluice.kernels.triton.route_topk:router_scores",
)
def router_scores(
    logits: torch.Tensor,
    rows: Group,
    shared: Group,
    table: Group,
    correction: torch.Tensor,
    sigmoid: bool,
    groups: int,
    topk_group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and selection scores of rows as they compete for a batch budget's set.

    Args:
        logits: (rows, experts), any float dtype, any strides.
        rows: `RouteRows`.
        shared: `Shared`.
        table: `PolicyTable`.
        correction: fp32, (experts,), added to selection scores; or (0,).
        sigmoid: scores are the sigmoid of the logits instead of their softmax.
        groups: expert groups, 1 for none.
        topk_group: groups that a row may choose from.

    Returns:
        Scores, re-mixed where that is asked, and selection scores; fp32, (rows, experts). Those
        out of reach are at -inf; what is forced has its own score, and its group is in reach.
    """
    policies, pulls = rows[0].long(), rows[2]
    scores = remixed(plain_scores(logits, sigmoid), pulls, shared)
    bias, forced = table[2][policies], (table[3][policies] & FORCED) != 0
    return scores, selection_scores(scores, correction, groups, topk_group, bias, forced)


def plain_scores(logits: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Scores of the experts, fp32, (rows, experts)."""
    logits = logits.float()
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def remixed(scores: torch.Tensor, pulls: torch.Tensor, shared: Group) -> torch.Tensor:
    """Scores with the rows that ask for it pulled towards their reference."""
    if not pulls.numel():
        return scores
    references, alpha, top, _ = shared
    own = pulls.long().clamp(min=0)
    mixed = remix_scores(scores, references[own], alpha[own], top[own])
    return torch.where(pulls.unsqueeze(-1) >= 0, mixed, scores)


def selection_scores(
    scores: torch.Tensor,
    correction: torch.Tensor,
    groups: int,
    topk_group: int,
    bias: torch.Tensor | None = None,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """What top-k runs on: corrected, biased, masked and limited to groups.

    Experts that are always selected have their own score here, and their group is in reach.

    Args:
        scores: fp32, (rows, experts).
        correction: fp32, (experts,) or (0,).
        groups: of the router.
        topk_group: of the router.
        bias: fp32, (rows, experts), -inf masks; or None.
        forced: bool, (rows, experts): experts that are always selected; or None.
    """
    choice = scores + correction if correction.numel() else scores
    if bias is not None:
        choice = choice + bias
    if groups > 1:
        grouped = choice.view(len(choice), groups, -1)
        # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
        counted = 2 if correction.numel() else 1
        reach = grouped.topk(min(counted, grouped.shape[-1]), dim=-1).values.sum(-1)
        if forced is not None:
            reach = reach.masked_fill(forced.view_as(grouped).any(-1), _FIRST)
        inside = torch.zeros_like(reach, dtype=torch.bool)
        inside.scatter_(1, best(reach, topk_group)[1], True)
        choice = grouped.masked_fill(~inside.unsqueeze(-1), _OUT).view_as(choice)
    return choice


def best(choice: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest entries of each row and where they are, (rows, k); of equals the first.

    Not `topk`: which of equals it takes depends on `k`, and so a row's on its neighbours'.
    """
    values, ids = choice.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
