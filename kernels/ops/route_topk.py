"""Router logits to selected experts and weights, under per-row controls, counted on the way.

The order within a layer is that of design section 6: scores, re-mix, selection bias and mask, group
limit, batch budget, top-k, drop, ratio, top-p, protection, weights.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation
from sluice.kernels.ops.router_scores import best, plain_scores, remixed, selection_scores
from sluice.kernels.ops.routing_args import (
    ACTIVE,
    DROPPED,
    FORCED,
    MASKED,
    PROTECTED,
    RANK,
    RATIO,
    ROUTED,
    ROWS,
    TAKEN,
    TOP_P,
    Group,
    K,
)


def _fake_counts(ids: torch.Tensor, owners: torch.Tensor, counts: Group, place: int) -> None:
    return None


@operation(
    fake=_fake_counts,
    mutates=("counts",),
    cpu="sluice.kernels.cpu.route_topk:count_selections",
)
def count_selections(ids: torch.Tensor, owners: torch.Tensor, counts: Group, place: int) -> None:
    """Count rows whose slots are all used.

    Args:
        ids: int32, (rows, slots).
        owners: int64, (rows,): token of the step, -1 for a row whose output is dropped. Or (0,)
            where nothing is counted by token.
        counts: `RouteCounts`, added to.
        place: row of the histogram.
    """
    kept = torch.ones_like(ids, dtype=torch.bool)
    taken = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    count_rows(ids, kept, taken, owners, counts, place)


def count_rows(
    ids: torch.Tensor,
    kept: torch.Tensor,
    taken: torch.Tensor,
    owners: torch.Tensor,
    counts: Group,
    place: int,
) -> None:
    """Add rows to the counts.

    Args:
        ids: (rows, slots).
        kept: bool, (rows, slots): which slots are used.
        taken: int64, (rows,): selections of the router's own that are not among them.
        owners: int64, (rows,) or (0,).
        counts: `RouteCounts`.
        place: row of the histogram.
    """
    histogram, ran = counts
    histogram[place].index_add_(0, ids.flatten().long(), kept.flatten().long())
    histogram[place, ROWS] += len(ids)
    histogram[place, MASKED] += taken.sum()
    if ran.numel():
        sums = torch.zeros((len(ids), 3), dtype=torch.int64, device=ids.device)
        sums[:, ACTIVE], sums[:, TAKEN], sums[:, ROUTED] = kept.sum(-1), taken, 1
        own = owners >= 0
        ran.index_add_(0, owners.clamp(min=0), sums * own.unsqueeze(-1))


_OUT = float("-inf")
_FIRST = float("inf")
SMALLEST = torch.finfo(torch.float32).tiny
"""Least score of an expert that is renormalised: those of no score share alike."""

UNUSED = -1
"""Id of an unused slot where the kernel of the experts leaves invalid ids out."""


def _fake(
    logits: torch.Tensor,
    stock: Group,
    rows: Group,
    shared: Group,
    table: Group,
    counts: Group,
    correction: torch.Tensor,
    place: int,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_group: int,
    width: int,
    repeat: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = logits.new_empty((len(logits), width), dtype=torch.float32)
    return weights, torch.empty_like(weights, dtype=torch.int32)


@operation(
    fake=_fake,
    mutates=("counts",),
    cpu="sluice.kernels.cpu.route_topk:route_topk",
    triton="sluice.kernels.triton.route_topk:route_topk",
)
def route_topk(
    logits: torch.Tensor,
    stock: Group,
    rows: Group,
    shared: Group,
    table: Group,
    counts: Group,
    correction: torch.Tensor,
    place: int,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_group: int,
    width: int,
    repeat: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select experts for the rows of one layer.

    Args:
        logits: (rows, experts), any float dtype, any strides.
        stock: weights, fp32, and ids, int32, (rows, top_k), of the router itself: what rows of
            policy 0 without reference and set get. Empty if there are none of them.
        rows: `RouteRows`.
        shared: `Shared`.
        table: `PolicyTable`.
        counts: `RouteCounts`, added to.
        correction: fp32, (experts,), added to selection scores; or (0,).
        place: row of the histogram.
        top_k: experts per token of the router itself.
        sigmoid: scores are the sigmoid of the logits instead of their softmax.
        renormalize: selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups, 1 for none.
        topk_group: groups that a row may choose from.
        width: slots a row; what no row can exceed.
        repeat: an unused slot repeats the row's first expert, with weight 0; else it has the id
            `UNUSED`.

    Returns:
        Weights, fp32, and ids, int32, (rows, width), contiguous; narrower where the fullest row
        needs less and knowing that makes nobody wait.
    """
    policies = rows[0].long()
    limits, cuts, bias, marks, forced_weight = (part[policies] for part in table)
    dropped, forced, protected = ((marks & bit) != 0 for bit in (DROPPED, FORCED, PROTECTED))
    k, rank = limits[:, K : K + 1].long(), limits[:, RANK].long()
    raw = plain_scores(logits, sigmoid)
    scores = remixed(raw, rows[2], shared)
    _, usual = best(selection_scores(raw, correction, groups, topk_group), top_k)
    choice = selection_scores(scores, correction, groups, topk_group, bias, forced)
    choice = choice.masked_fill(forced, _FIRST)
    choice = _within(choice, rows[3], shared[3], protected, usual)

    values, ids = best(choice, min(width, choice.shape[1]))
    slots = torch.arange(ids.shape[1], device=ids.device)
    held = scores.gather(1, ids)
    sparing = forced.gather(1, ids)
    kept = (values > _OUT) & (slots < k) & ~dropped.gather(1, ids)
    first = held.masked_fill(~kept, 0.0).amax(-1, keepdim=True)
    kept &= (held >= cuts[:, RATIO : RATIO + 1] * first) | sparing
    most = cuts[:, TOP_P : TOP_P + 1]
    if sigmoid:
        most = most * scores.sum(-1, keepdim=True)
    kept &= (_before(held.masked_fill(~kept, 0.0)) <= most) | sparing

    missing = ~_holds(ids, kept, usual, scores.shape[1])
    back = protected.gather(1, usual) & missing
    ids, kept = torch.cat([ids, usual], 1), torch.cat([kept, back], 1)
    sparing = torch.cat([sparing, torch.zeros_like(back)], 1)
    weights = _weighed(scores.gather(1, ids), kept, sparing, forced_weight.gather(1, ids))
    taken = (missing & ~back).sum(-1)
    if renormalize:
        # A mask may leave only experts whose scores are too small for fp32; they share alike.
        weights = weights.clamp(min=SMALLEST).masked_fill(~kept, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * scale

    weak = rank >= 0
    ranked = best(choice, choice.shape[1])[1].gather(1, rank.clamp(min=0).unsqueeze(-1))
    ids = torch.where(weak.unsqueeze(-1), ranked, ids)
    weights = weights.masked_fill(weak.unsqueeze(-1), scale)
    kept = torch.where(weak.unsqueeze(-1), torch.arange(kept.shape[1], device=ids.device) < 1, kept)
    taken = torch.where(weak, top_k - (rank < top_k).long(), taken)
    if stock:
        left = (policies == 0) & ~_asks(rows[2]) & ~_asks(rows[3])
        more = ids.shape[1] - top_k
        own = left.unsqueeze(-1)
        weights = torch.where(own, torch.nn.functional.pad(stock[0], (0, more)), weights)
        ids = torch.where(own, torch.nn.functional.pad(stock[1], (0, more)).long(), ids)
        kept = torch.where(own, torch.arange(kept.shape[1], device=ids.device) < top_k, kept)
        taken = taken.masked_fill(left, 0)
    count_rows(ids, kept, taken, rows[1], counts, place)
    return _packed(weights, ids, kept, width, repeat)


def _asks(places: torch.Tensor) -> torch.Tensor:
    return places >= 0 if places.numel() else torch.zeros((), dtype=torch.bool)


def _within(
    choice: torch.Tensor,
    sets: torch.Tensor,
    within: torch.Tensor,
    protected: torch.Tensor,
    usual: torch.Tensor,
) -> torch.Tensor:
    """Selection scores with rows limited to their set, what is forced, and protected experts."""
    if not sets.numel():
        return choice
    own = torch.zeros_like(protected).scatter_(1, usual, True)
    inside = within[sets.long().clamp(min=0)] | (choice == _FIRST) | (protected & own)
    return choice.masked_fill((sets.unsqueeze(-1) >= 0) & ~inside, _OUT)


def _before(held: torch.Tensor) -> torch.Tensor:
    """Sum of what better ranks hold, (rows, slots)."""
    values, order = held.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(held).scatter_(1, order, values.cumsum(-1) - values)


def _holds(
    ids: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor, experts: int
) -> torch.Tensor:
    """Whether rows still have experts in. `wanted`: (rows, n)."""
    chosen = torch.zeros((len(ids), experts), dtype=torch.bool, device=ids.device)
    return chosen.scatter_(1, ids, kept).gather(1, wanted)


def _weighed(
    held: torch.Tensor, kept: torch.Tensor, forced: torch.Tensor, given: torch.Tensor
) -> torch.Tensor:
    """Scores with what is forced at its own weight, or else at the mean of the row's others."""
    others = kept & ~forced
    count = others.sum(-1, keepdim=True)
    mean = held.masked_fill(~others, 0.0).sum(-1, keepdim=True) / count
    # Where everything is forced there is no mean, and experts weigh what they scored.
    unasked = torch.where(count > 0, mean, held)
    return torch.where(forced, torch.where(given.isnan(), unasked, given), held)


def _packed(
    weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, width: int, repeat: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is in first, in order, then unused slots."""
    order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]
    weights, ids, kept = (part.gather(1, order) for part in (weights, ids, kept))
    if ids.device.type == "cpu":
        # A row of NaN selects nothing.
        used = max(1, int(kept.sum(-1).max()))
        weights, ids, kept = (part[:, :used] for part in (weights, ids, kept))
    unused = ids[:, :1] if repeat else torch.full_like(ids[:, :1], UNUSED)
    ids = torch.where(kept, ids, unused).to(torch.int32)
    return weights.masked_fill(~kept, 0.0).contiguous(), ids.contiguous()
