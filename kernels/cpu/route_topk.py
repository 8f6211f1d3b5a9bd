"""`route_topk` and `count_selections` on a CPU: one pass per row, in machine code.

The rules are those of `sluice.kernels.ops.route_topk`. The steps of a row are in `router_rows`
(logits to selection scores) and `selected_row` (selection scores to experts and weights).
"""

from __future__ import annotations

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import best_of, choice_row, fp32_array, remix_row, score_row
from sluice.kernels.cpu.selected_row import keep_within, put_back, select_row, weigh_forced
from sluice.kernels.ops.router_config import ACTIVE, MASKED, ROUTED, ROWS, TAKEN
from sluice.kernels.ops.routing_args import (
    CHANGES,
    FORCED,
    RANK,
    RATIO,
    SMALLEST,
    TOP_P,
    K,
    PolicyTable,
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)

_NO_STOCK = np.empty((0, 0), dtype=np.float32), np.empty((0, 0), dtype=np.int32)
_SMALLEST = np.float32(SMALLEST)


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
    """See `sluice.kernels.ops.route_topk.route_topk`; as wide as the fullest row needs."""
    weights = np.empty((len(logits), width), dtype=np.float32)
    ids = np.empty((len(logits), width), dtype=np.int32)
    stock_arrays = _NO_STOCK
    if stock.ids.numel():
        stock_arrays = stock.weights.numpy(), stock.ids.numpy()
    asked, targets, policies, sums = rows.arrays, shared.arrays, table.arrays, counts.arrays
    used = _route(
        fp32_array(logits),
        *stock_arrays,
        asked.policy_index,
        asked.token_index,
        asked.remix_index,
        asked.set_index,
        targets.references,
        targets.alpha,
        targets.top,
        targets.members,
        policies.limits,
        policies.cuts,
        policies.bias,
        policies.marks,
        policies.forced_weight,
        sums.histogram,
        sums.by_token,
        router.correction_array,
        moe_index,
        router.top_k,
        router.sigmoid,
        router.renormalize,
        router.scale,
        router.groups,
        router.topk_group,
        weights,
        ids,
    )
    if used < width:
        # vLLM's CPU kernel reads memory, not strides.
        weights = np.ascontiguousarray(weights[:, :used])
        ids = np.ascontiguousarray(ids[:, :used])
    return torch.from_numpy(weights), torch.from_numpy(ids)


def count_selections(
    ids: torch.Tensor, token_index: torch.Tensor, counts: SelectionCounts, moe_index: int
) -> None:
    """See `sluice.kernels.ops.route_topk.count_selections`."""
    sums = counts.arrays
    _count(ids.contiguous().numpy(), token_index.numpy(), sums.histogram, sums.by_token, moe_index)


@compiled
def _route(
    logits: Array,
    stock_weights: Array,
    stock_ids: Array,
    policy_index: Array,
    token_index: Array,
    remix_index: Array,
    set_index: Array,
    references: Array,
    alpha: Array,
    top: Array,
    members: Array,
    limits: Array,
    cuts: Array,
    bias: Array,
    marks: Array,
    forced_weight: Array,
    histograms: Array,
    by_token: Array,
    correction: Array,
    moe_index: int,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_group: int,
    weights: Array,
    ids: Array,
) -> int:
    """Write `weights` and `ids`, add to the counts; how many slots the fullest row needs."""
    rows, experts = logits.shape
    histogram = histograms[moe_index]
    scores = np.empty(experts, dtype=np.float32)
    router_choice = np.empty(experts, dtype=np.float32)
    choice = np.empty(experts, dtype=np.float32)
    order = np.empty(experts, dtype=np.int64)
    keys = np.empty(experts, dtype=np.int64)
    group_scores = np.empty(groups, dtype=np.float32)
    router_ids = np.empty(top_k, dtype=np.int64)
    slots = np.empty(experts + top_k, dtype=np.int64)
    slot_scores = np.empty(experts + top_k, dtype=np.float32)
    widest = 1
    for r in range(rows):
        p = policy_index[r]
        remix = remix_index[r] if len(remix_index) else -1
        row_set = set_index[r] if len(set_index) else -1
        if p == 0 and remix < 0 and row_set < 0 and len(stock_ids):
            active, taken = top_k, 0
            for slot in range(top_k):
                ids[r, slot] = stock_ids[r, slot]
                weights[r, slot] = stock_weights[r, slot]
        else:
            score_row(logits[r], sigmoid, scores)
            choice_row(
                scores,
                correction,
                bias[0],
                marks[0],
                groups,
                topk_group,
                order,
                keys,
                group_scores,
                router_choice,
            )
            changes = limits[p, CHANGES] != 0
            if remix >= 0:
                remix_row(scores, references[remix], alpha[remix], top[remix], order, keys)
            if changes or remix >= 0:
                choice_row(
                    scores,
                    correction,
                    bias[p],
                    marks[p],
                    groups,
                    topk_group,
                    order,
                    keys,
                    group_scores,
                    choice,
                )
                for e in range(experts):
                    if marks[p, e] & FORCED:
                        choice[e] = np.inf
            else:
                # `choice[:] = ...` would take longer over its checks than over the numbers.
                for e in range(experts):
                    choice[e] = router_choice[e]
            # What the router selects by itself matters to rows that may select otherwise.
            differs = changes or remix >= 0 or row_set >= 0 or limits[p, K] > top_k
            if differs:
                best_of(router_choice, experts, top_k, router_ids, keys)
            if row_set >= 0:
                keep_within(members[row_set], marks[p], router_ids, choice)
            if limits[p, RANK] >= 0:
                rank = limits[p, RANK]
                best_of(choice, experts, rank + 1, slots, keys)
                ids[r, 0] = slots[rank]
                weights[r, 0] = scale
                active = 1
                taken = top_k - 1 if rank < top_k else top_k
            else:
                active = select_row(
                    scores,
                    choice,
                    marks[p],
                    limits[p, K],
                    cuts[p, RATIO],
                    cuts[p, TOP_P],
                    sigmoid,
                    slots,
                    slot_scores,
                    order,
                    keys,
                )
                taken = top_k - active
                if differs:
                    active, taken = put_back(
                        scores, marks[p], router_ids, slots, slot_scores, active
                    )
                if changes:
                    weigh_forced(marks[p], forced_weight[p], slots, slot_scores, active)
                total = np.float32(1.0)
                if renormalize:
                    total = np.float32(0.0)
                    for slot in range(active):
                        # A mask may leave only scores too small for fp32; they share alike.
                        slot_scores[slot] = max(slot_scores[slot], _SMALLEST)
                        total += slot_scores[slot]
                for slot in range(active):
                    ids[r, slot] = slots[slot]
                    weights[r, slot] = slot_scores[slot] / total * scale
        if active == 0:
            # A row of NaN selects nothing, and the kernel of the experts reads what an id names.
            ids[r, 0] = slots[0]
        for slot in range(active, ids.shape[1]):
            ids[r, slot] = ids[r, 0]
            weights[r, slot] = 0.0
        for slot in range(active):
            histogram[ids[r, slot]] += 1
        histogram[MASKED] += taken
        if len(by_token) and token_index[r] >= 0:
            by_token[token_index[r], ACTIVE] += active
            by_token[token_index[r], TAKEN] += taken
            by_token[token_index[r], ROUTED] += 1
        widest = max(widest, active)
    histogram[ROWS] += rows
    return widest


@compiled
def _count(
    ids: Array, token_index: Array, histograms: Array, by_token: Array, moe_index: int
) -> None:
    rows, slots = ids.shape
    histogram = histograms[moe_index]
    for r in range(rows):
        for slot in range(slots):
            histogram[ids[r, slot]] += 1
        if len(by_token) and token_index[r] >= 0:
            by_token[token_index[r], ACTIVE] += slots
            by_token[token_index[r], ROUTED] += 1
    histogram[ROWS] += rows
