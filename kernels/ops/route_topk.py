"""Router logits to selected experts and weights, under per-row controls, counted on the way.

The order within a layer: scores, re-mix, selection bias and mask, group limit, batch budget, top-k,
drop, ratio, top-p, protection, weights. What each control means is in `docs/experts.md`. Rows that
a policy leaves alone are only counted (`count_selections`).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sluice.kernels.dispatch import operation
from sluice.kernels.ops.router_config import ACTIVE, MASKED, ROUTED, ROWS, TAKEN
from sluice.kernels.ops.router_scores import (
    IN_REACH,
    OUT_OF_REACH,
    best,
    plain_scores,
    remixed,
    selection_scores,
)
from sluice.kernels.ops.routing_args import (
    DROPPED,
    FORCED,
    PROTECTED,
    RANK,
    RATIO,
    SMALLEST,
    TOP_P,
    UNUSED,
    K,
    PolicyTable,
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)


def _fake(
    logits: torch.Tensor,
    rows: RouteRows,
    shared: Shared,
    table: PolicyTable,
    router: RouterSpec,
    stock: Selection,
    counts: SelectionCounts,
    moe_index: int,
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
    rows: RouteRows,
    shared: Shared,
    table: PolicyTable,
    router: RouterSpec,
    stock: Selection,
    counts: SelectionCounts,
    moe_index: int,
    width: int,
    repeat: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select experts for the rows of one layer.

    Args:
        logits: (rows, experts), any float dtype, any strides.
        rows: what each row asks.
        shared: what rows refer to beside their policies.
        table: policies.
        router: of the layer.
        stock: what rows of policy 0 without reference and set get: the router's own selection.
            Nothing if there are no such rows.
        counts: added to.
        moe_index: row of the histogram: the layer's place among those with experts.
        width: slots a row; what no row can exceed.
        repeat: an unused slot repeats the row's first expert, with weight 0; else it has the id
            `UNUSED`.

    Returns:
        Weights, fp32, and ids, int32, (rows, width), contiguous; narrower where the fullest row
        needs less and the host knows that without waiting for the device.
    """
    policies, top_k = rows.policy_index.long(), router.top_k
    limits, cuts, marks = table.limits[policies], table.cuts[policies], table.marks[policies]
    dropped, forced, protected = ((marks & bit) != 0 for bit in (DROPPED, FORCED, PROTECTED))
    k, rank = limits[:, K : K + 1].long(), limits[:, RANK].long()
    raw = plain_scores(logits, router.sigmoid)
    scores = remixed(raw, rows.remix_index, shared)
    _, router_ids = best(selection_scores(raw, router), top_k)
    choice = selection_scores(scores, router, table.bias[policies], forced)
    choice = choice.masked_fill(forced, IN_REACH)
    choice = _within_sets(choice, rows.set_index, shared.members, protected, router_ids)

    values, ids = best(choice, min(width, choice.shape[1]))
    slots = torch.arange(ids.shape[1], device=ids.device)
    slot_scores = scores.gather(1, ids)
    never_cut = forced.gather(1, ids)
    kept = (values > OUT_OF_REACH) & (slots < k) & ~dropped.gather(1, ids)
    first = slot_scores.masked_fill(~kept, 0.0).amax(-1, keepdim=True)
    kept &= (slot_scores >= cuts[:, RATIO : RATIO + 1] * first) | never_cut
    most = cuts[:, TOP_P : TOP_P + 1]
    if router.sigmoid:
        most = most * scores.sum(-1, keepdim=True)
    kept &= (_sum_before(slot_scores.masked_fill(~kept, 0.0)) <= most) | never_cut

    missing = ~_selected(ids, kept, router_ids, scores.shape[1])
    put_back = protected.gather(1, router_ids) & missing
    ids, kept = torch.cat([ids, router_ids], 1), torch.cat([kept, put_back], 1)
    forced_slots = torch.cat([never_cut, torch.zeros_like(put_back)], 1)
    forced_weight = table.forced_weight[policies].gather(1, ids)
    weights = _with_forced_weights(scores.gather(1, ids), kept, forced_slots, forced_weight)
    taken = (missing & ~put_back).sum(-1)
    if router.renormalize:
        # A mask may leave only experts whose scores are too small for fp32; they share alike.
        weights = weights.clamp(min=SMALLEST).masked_fill(~kept, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * router.scale

    slots = torch.arange(kept.shape[1], device=ids.device)
    weak = rank >= 0
    at_rank = best(choice, choice.shape[1])[1].gather(1, rank.clamp(min=0).unsqueeze(-1))
    ids = torch.where(weak.unsqueeze(-1), at_rank, ids)
    weights = weights.masked_fill(weak.unsqueeze(-1), router.scale)
    kept = torch.where(weak.unsqueeze(-1), slots < 1, kept)
    taken = torch.where(weak, top_k - (rank < top_k).long(), taken)
    if stock.ids.numel():
        left = (policies == 0) & ~_given(rows.remix_index) & ~_given(rows.set_index)
        more = ids.shape[1] - top_k
        weights = torch.where(left.unsqueeze(-1), pad(stock.weights, (0, more)), weights)
        ids = torch.where(left.unsqueeze(-1), pad(stock.ids, (0, more)).long(), ids)
        kept = torch.where(left.unsqueeze(-1), slots < top_k, kept)
        taken = taken.masked_fill(left, 0)
    _count_rows(ids, kept, taken, rows.token_index, counts, moe_index)
    return _packed(weights, ids, kept, width, repeat)


def _fake_counts(
    ids: torch.Tensor,
    token_index: torch.Tensor,
    counts: SelectionCounts,
    moe_index: int,
) -> None:
    return None


@operation(
    fake=_fake_counts,
    mutates=("counts",),
    cpu="sluice.kernels.cpu.route_topk:count_selections",
)
def count_selections(
    ids: torch.Tensor, token_index: torch.Tensor, counts: SelectionCounts, moe_index: int
) -> None:
    """Count rows whose slots are all used.

    Args:
        ids: int32, (rows, slots).
        token_index: int64, (rows,): token of the step, -1 for a row whose output is dropped. Or
            (0,) where nothing is counted by token.
        counts: added to.
        moe_index: row of the histogram: the layer's place among those with experts.
    """
    kept = torch.ones_like(ids, dtype=torch.bool)
    taken = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    _count_rows(ids, kept, taken, token_index, counts, moe_index)


def _count_rows(
    ids: torch.Tensor,
    kept: torch.Tensor,
    taken: torch.Tensor,
    token_index: torch.Tensor,
    counts: SelectionCounts,
    moe_index: int,
) -> None:
    """Add rows to the counts.

    Args:
        ids: (rows, slots).
        kept: bool, (rows, slots): which slots are used.
        taken: int64, (rows,): selections of the router's own that are not among them.
        token_index: int64, (rows,) or (0,).
        counts: added to.
        moe_index: row of the histogram.
    """
    histogram = counts.histogram[moe_index]
    histogram.index_add_(0, ids.flatten().long(), kept.flatten().long())
    histogram[ROWS] += len(ids)
    histogram[MASKED] += taken.sum()
    if counts.by_token.numel():
        sums = torch.zeros((len(ids), 3), dtype=torch.int64, device=ids.device)
        sums[:, ACTIVE], sums[:, TAKEN], sums[:, ROUTED] = kept.sum(-1), taken, 1
        counted = token_index >= 0
        counts.by_token.index_add_(0, token_index.clamp(min=0), sums * counted.unsqueeze(-1))


def _given(index: torch.Tensor) -> torch.Tensor:
    """Which rows have an index; `index` is (0,) if none has."""
    return index >= 0 if index.numel() else torch.zeros((), dtype=torch.bool, device=index.device)


def _within_sets(
    choice: torch.Tensor,
    set_index: torch.Tensor,
    members: torch.Tensor,
    protected: torch.Tensor,
    router_ids: torch.Tensor,
) -> torch.Tensor:
    """Selection scores with rows limited to their set, what is forced, and protected experts."""
    if not set_index.numel():
        return choice
    by_router = torch.zeros_like(protected).scatter_(1, router_ids, True)
    allowed = members[set_index.long().clamp(min=0)] | (choice == IN_REACH)
    allowed |= protected & by_router
    return choice.masked_fill((set_index.unsqueeze(-1) >= 0) & ~allowed, OUT_OF_REACH)


def _sum_before(slot_scores: torch.Tensor) -> torch.Tensor:
    """Sum of the scores of better ranks, (rows, slots)."""
    values, order = slot_scores.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(slot_scores).scatter_(1, order, values.cumsum(-1) - values)


def _selected(
    ids: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor, experts: int
) -> torch.Tensor:
    """Whether rows have experts among those that are kept. `wanted`: ids, (rows, n)."""
    selected = torch.zeros((len(ids), experts), dtype=torch.bool, device=ids.device)
    return selected.scatter_(1, ids, kept).gather(1, wanted)


def _with_forced_weights(
    slot_scores: torch.Tensor,
    kept: torch.Tensor,
    forced: torch.Tensor,
    forced_weight: torch.Tensor,
) -> torch.Tensor:
    """Scores with what is forced at its own weight, or else at the mean of the row's others."""
    others = kept & ~forced
    count = others.sum(-1, keepdim=True)
    mean = slot_scores.masked_fill(~others, 0.0).sum(-1, keepdim=True) / count
    # Where everything is forced there is no mean, and experts weigh what they scored.
    unweighted = torch.where(count > 0, mean, slot_scores)
    weights = torch.where(forced_weight.isnan(), unweighted, forced_weight)
    return torch.where(forced, weights, slot_scores)


def _packed(
    weights: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, width: int, repeat: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Used slots first, in order, then unused ones."""
    order = (~kept).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]
    weights, ids, kept = (part.gather(1, order) for part in (weights, ids, kept))
    if ids.device.type == "cpu":
        # A row of NaN selects nothing.
        used = max(1, int(kept.sum(-1).max()))
        weights, ids, kept = (part[:, :used] for part in (weights, ids, kept))
    unused = ids[:, :1] if repeat else torch.full_like(ids[:, :1], UNUSED)
    ids = torch.where(kept, ids, unused).to(torch.int32)
    return weights.masked_fill(~kept, 0.0).contiguous(), ids.contiguous()
