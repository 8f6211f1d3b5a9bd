"""Router logits to scores, and to what top-k runs on.

The first half of the order in `sluice.kernels.ops.route_topk`: scores, re-mix (C3PO, arXiv
2504.07964), selection bias and mask, group limit. `route_topk` does all of it in one go; a batch
budget needs these scores first, to agree on the set of experts that its rows share.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation
from sluice.kernels.ops.routing_args import FORCED, PolicyTable, RouteRows, RouterSpec, Shared

OUT_OF_REACH = float("-inf")
"""Selection score of an expert that a row cannot select."""
IN_REACH = float("inf")
"""Selection score of an expert that a row always selects, and of a group that has one."""


def _fake(
    logits: torch.Tensor,
    rows: RouteRows,
    shared: Shared,
    table: PolicyTable,
    router: RouterSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.new_empty(logits.shape, dtype=torch.float32)
    return scores, torch.empty_like(scores)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.router_scores:router_scores",
    triton="sluice.kernels.triton.router_scores:router_scores",
)
def router_scores(
    logits: torch.Tensor, rows: RouteRows, shared: Shared, table: PolicyTable, router: RouterSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and selection scores of rows as they compete for a batch budget's set.

    Args:
        logits: (rows, experts), any float dtype, any strides.
        rows: what each row asks; sets are left out.
        shared: references of the re-mix.
        table: policies; of their controls biases and what is forced matter here.
        router: of the layer.

    Returns:
        Scores, re-mixed where that is asked, and selection scores; fp32, (rows, experts). Those
        out of reach are at -inf; what is forced has its own score, and its group is in reach.
    """
    policies = rows.policy_index.long()
    scores = remixed(plain_scores(logits, router.sigmoid), rows.remix_index, shared)
    forced = (table.marks[policies] & FORCED) != 0
    return scores, selection_scores(scores, router, table.bias[policies], forced)


def plain_scores(logits: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Scores of the experts, fp32, (rows, experts)."""
    logits = logits.float()
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def remixed(scores: torch.Tensor, remix_index: torch.Tensor, shared: Shared) -> torch.Tensor:
    """Scores with the rows that ask for it pulled towards their reference."""
    if not remix_index.numel():
        return scores
    index = remix_index.long().clamp(min=0)
    mixed = remix_scores(scores, shared.references[index], shared.alpha[index], shared.top[index])
    return torch.where(remix_index.unsqueeze(-1) >= 0, mixed, scores)


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
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(ranked)
    takes_part = torch.zeros_like(scores, dtype=torch.bool)
    takes_part.scatter_(1, ranked, ranks < top.unsqueeze(-1))
    mass = scores.masked_fill(~takes_part, 0.0).sum(-1, keepdim=True)
    target = reference.masked_fill(~takes_part, 0.0)
    target_mass = target.sum(-1, keepdim=True)
    # In this order: the reference may weigh so little that its inverse has no fp32.
    target = target / target_mass * mass
    share = alpha.unsqueeze(-1)
    mixed = share * scores + (1 - share) * target
    return torch.where(takes_part & (target_mass > 0), mixed, scores)


def selection_scores(
    scores: torch.Tensor,
    router: RouterSpec,
    bias: torch.Tensor | None = None,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """What top-k runs on: corrected, biased, masked and limited to groups.

    Experts that are always selected have their own score here, and their group is in reach.

    Args:
        scores: fp32, (rows, experts).
        router: of the layer, its correction on the scores' device.
        bias: fp32, (rows, experts), -inf masks; or None.
        forced: bool, (rows, experts): experts that are always selected; or None.

    Returns:
        fp32, (rows, experts).
    """
    corrected = router.correction.numel() > 0
    choice = scores + router.correction if corrected else scores
    if bias is not None:
        choice = choice + bias
    if router.groups > 1:
        grouped = choice.view(len(choice), router.groups, -1)
        # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
        rated = min(2 if corrected else 1, grouped.shape[-1])
        group_scores = grouped.topk(rated, dim=-1).values.sum(-1)
        if forced is not None:
            group_scores = group_scores.masked_fill(forced.view_as(grouped).any(-1), IN_REACH)
        reached = torch.zeros_like(group_scores, dtype=torch.bool)
        reached.scatter_(1, best(group_scores, router.topk_group)[1], True)
        choice = grouped.masked_fill(~reached.unsqueeze(-1), OUT_OF_REACH).view_as(choice)
    return choice


def best(choice: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest entries of each row and where they are, (rows, k); of equals the first.

    Not `topk`: which of equals it takes depends on `k`, and so a row's on its neighbours'.
    """
    values, ids = choice.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
