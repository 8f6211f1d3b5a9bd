"""`route_topk` in Triton: a program holds a block of rows, (rows, experts), in registers.

The rules are those of `sluice.kernels.ops.route_topk`. Sizes that end in a power of two are capital
letters: `R` rows, `E` experts, `S` slots of a row, `U` experts of the router's own choice.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.routing_args import (
    DROPPED,
    FORCED,
    PROTECTED,
    SMALLEST,
    UNUSED,
    PolicyTable,
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)
from sluice.kernels.triton.router_rows import blocks, choices, first_of, remixed, scored_rows

_DROPPED = tl.constexpr(DROPPED)
_FORCED = tl.constexpr(FORCED)
_PROTECTED = tl.constexpr(PROTECTED)
_UNUSED = tl.constexpr(UNUSED)
_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _picked(chosen: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The one entry of each row of `block` where `chosen`."""
    return tl.sum(tl.where(chosen, block, 0), axis=1)


@triton.jit
def _route(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    stock_weights: tl.tensor,
    stock_ids: tl.tensor,
    policy_index: tl.tensor,
    token_index: tl.tensor,
    remix_index: tl.tensor,
    set_index: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    members: tl.tensor,
    limits: tl.tensor,
    cuts: tl.tensor,
    biases: tl.tensor,
    marks: tl.tensor,
    forced_weights: tl.tensor,
    histogram: tl.tensor,
    by_token: tl.tensor,
    corrections: tl.tensor,
    weights_out: tl.tensor,
    ids_out: tl.tensor,
    rows: int,
    scale: float,
    width: int,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    REPEAT: tl.constexpr,
    HAS_STOCK: tl.constexpr,
    HAS_REMIX: tl.constexpr,
    HAS_SETS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    CORRECTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
) -> None:
    row, valid, experts, inside, raw = scored_rows(
        logits, row_stride, column_stride, rows, SIGMOID, EXPERTS, R, E
    )
    policy = tl.load(policy_index + row, mask=valid, other=0)
    at_policy = policy[:, None] * EXPERTS + experts[None, :]
    bias = tl.load(biases + at_policy, mask=inside, other=0.0)
    mark = tl.load(marks + at_policy, mask=inside, other=0).to(tl.int32)
    forced_weight = tl.load(forced_weights + at_policy, mask=inside, other=0.0)
    k = tl.load(limits + policy * 3, mask=valid, other=1)
    rank = tl.load(limits + policy * 3 + 1, mask=valid, other=-1)
    ratio = tl.load(cuts + policy * 2, mask=valid, other=0.0)
    top_p = tl.load(cuts + policy * 2 + 1, mask=valid, other=float("inf"))
    forced = (mark & _FORCED) != 0

    scores = raw
    correction = tl.zeros_like(raw)
    remix = tl.zeros_like(policy) - 1
    if HAS_REMIX:
        remix = tl.load(remix_index + row, mask=valid, other=-1)
        scores = remixed(raw, experts, inside, remix, references, alphas, tops, EXPERTS)
    if CORRECTED:
        correction += tl.load(corrections + experts, mask=experts < EXPERTS, other=0.0)[None, :]
    nothing = tl.zeros_like(raw)
    router_choice = choices(
        raw, correction, nothing, nothing > 0.0, experts, inside,
        CORRECTED, GROUPS, TOPK_GROUP, EXPERTS,
    )  # fmt: skip
    choice = choices(
        scores, correction, bias, forced, experts, inside, CORRECTED, GROUPS, TOPK_GROUP, EXPERTS
    )
    choice = tl.where(forced, float("inf"), choice)

    # The router's own choice: what a policy takes away is counted, what is protected comes back.
    ranks = tl.arange(0, U)
    router_ids = tl.zeros([R, U], dtype=tl.int32)
    router_scores = tl.zeros([R, U], dtype=tl.float32)
    router_marks = tl.zeros([R, U], dtype=tl.int32)
    by_router = nothing > 0.0
    for slot in range(TOP_K):
        _, expert = first_of(router_choice, experts)
        chosen = experts[None, :] == expert[:, None]
        by_router = by_router | chosen
        at_slot = (ranks == slot)[None, :]
        router_ids = tl.where(at_slot, expert[:, None], router_ids)
        router_scores = tl.where(at_slot, _picked(chosen, scores)[:, None], router_scores)
        router_marks = tl.where(at_slot, _picked(chosen, mark)[:, None], router_marks)
        router_choice = tl.where(chosen, float("-inf"), router_choice)

    row_set = tl.zeros_like(policy) - 1
    if HAS_SETS:
        row_set = tl.load(set_index + row, mask=valid, other=-1)
        bound = inside & (row_set >= 0)[:, None]
        member = tl.load(
            members + row_set[:, None] * EXPERTS + experts[None, :], mask=bound, other=1
        )
        stays = (member != 0) | forced | (((mark & _PROTECTED) != 0) & by_router)
        choice = tl.where(stays, choice, float("-inf"))

    slots = tl.arange(0, S)
    ids = tl.zeros([R, S], dtype=tl.int32)
    slot_scores = tl.zeros([R, S], dtype=tl.float32)
    slot_marks = tl.zeros([R, S], dtype=tl.int32)
    slot_forced_weight = tl.zeros([R, S], dtype=tl.float32)
    kept = tl.zeros([R, S], dtype=tl.int32) > 0
    ranked = tl.zeros([R], dtype=tl.int32)
    for slot in range(tl.max(tl.maximum(k, rank + 1), axis=0)):
        value, expert = first_of(choice, experts)
        chosen = experts[None, :] == expert[:, None]
        at_slot = (slots == slot)[None, :]
        ids = tl.where(at_slot, expert[:, None], ids)
        slot_scores = tl.where(at_slot, _picked(chosen, scores)[:, None], slot_scores)
        slot_marks = tl.where(at_slot, _picked(chosen, mark)[:, None], slot_marks)
        slot_forced_weight = tl.where(
            at_slot, _picked(chosen, forced_weight)[:, None], slot_forced_weight
        )
        kept = kept | (at_slot & (value > float("-inf"))[:, None] & (slot < k)[:, None])
        ranked = tl.where(rank == slot, expert, ranked)
        choice = tl.where(chosen, float("-inf"), choice)

    kept = kept & ((slot_marks & _DROPPED) == 0)
    never_cut = (slot_marks & _FORCED) != 0
    first = tl.max(tl.where(kept, slot_scores, 0.0), axis=1)
    kept = kept & ((slot_scores >= (ratio * first)[:, None]) | never_cut)
    if tl.min(top_p, axis=0) < float("inf"):
        most = top_p
        if SIGMOID:
            most = top_p * tl.sum(scores, axis=1)
        has = tl.where(kept, slot_scores, 0.0)
        ahead = has[:, None, :] > has[:, :, None]
        ahead = ahead | ((has[:, None, :] == has[:, :, None]) & (slots[None, :] < slots[:, None]))
        before = tl.sum(tl.where(ahead, has[:, None, :], 0.0), axis=2)
        kept = kept & ((before <= most[:, None]) | never_cut)

    alike = (router_ids[:, :, None] == ids[:, None, :]) & kept[:, None, :]
    present = tl.max(alike.to(tl.int32), axis=2) > 0
    missing = (ranks < TOP_K)[None, :] & ~present
    put_back = missing & ((router_marks & _PROTECTED) != 0)
    taken = tl.sum((missing & ~put_back).to(tl.int32), axis=1)

    others = kept & ~never_cut
    count = tl.sum(others.to(tl.int32), axis=1) + tl.sum(put_back.to(tl.int32), axis=1)
    total = tl.sum(tl.where(others, slot_scores, 0.0), axis=1) + tl.sum(
        tl.where(put_back, router_scores, 0.0), axis=1
    )
    mean = (total / tl.maximum(count, 1).to(tl.float32))[:, None]
    # Where everything is forced there is no mean, and experts weigh what they scored.
    unweighted = tl.where((count > 0)[:, None], mean, slot_scores)
    weights = tl.where(slot_forced_weight == slot_forced_weight, slot_forced_weight, unweighted)
    weights = tl.where(never_cut, weights, slot_scores)
    if RENORMALIZE:
        # A mask may leave only experts whose scores are too small for fp32; they share alike.
        weights = tl.where(kept, tl.maximum(weights, _SMALLEST), 0.0)
        router_scores = tl.where(put_back, tl.maximum(router_scores, _SMALLEST), 0.0)
        total = (tl.sum(weights, axis=1) + tl.sum(router_scores, axis=1))[:, None]
        total = tl.where(total > 0.0, total, 1.0)
        weights, router_scores = weights / total, router_scores / total
    weights, router_scores = weights * scale, router_scores * scale

    weak = (rank >= 0)[:, None]
    ids = tl.where(weak, ranked[:, None], ids)
    weights = tl.where(weak, scale, weights)
    kept = tl.where(weak, (slots == 0)[None, :], kept)
    put_back = put_back & ~weak
    taken = tl.where(rank >= 0, TOP_K - (rank < TOP_K).to(tl.int32), taken)
    if HAS_STOCK:
        left = valid & (policy == 0) & (remix < 0) & (row_set < 0)
        is_stock = left[:, None] & (ranks < TOP_K)[None, :]
        stock_at = row[:, None] * TOP_K + ranks[None, :]
        router_ids = tl.where(
            is_stock, tl.load(stock_ids + stock_at, mask=is_stock, other=0), router_ids
        )
        router_scores = tl.where(
            is_stock,
            tl.load(stock_weights + stock_at, mask=is_stock, other=0.0),
            router_scores,
        )
        kept = kept & ~left[:, None]
        put_back = tl.where(left[:, None], is_stock, put_back)
        taken = tl.where(left, 0, taken)

    kept, put_back = kept & valid[:, None], put_back & valid[:, None]
    numbers = kept.to(tl.int32)
    slot_at = tl.cumsum(numbers, axis=1) - 1
    selected = tl.sum(numbers, axis=1)
    put_back_at = selected[:, None] + tl.cumsum(put_back.to(tl.int32), axis=1) - 1
    active = selected + tl.sum(put_back.to(tl.int32), axis=1)
    out = row[:, None] * width
    tl.store(ids_out + out + slot_at, ids, mask=kept)
    tl.store(weights_out + out + slot_at, weights, mask=kept)
    tl.store(ids_out + out + put_back_at, router_ids, mask=put_back)
    tl.store(weights_out + out + put_back_at, router_scores, mask=put_back)
    unused = tl.zeros([R], dtype=tl.int32) + _UNUSED
    if REPEAT:
        unused = _picked(kept & (slot_at == 0), ids) + _picked(
            put_back & (put_back_at == 0), router_ids
        )
    idle = valid[:, None] & (slots >= active[:, None]) & (slots < width)[None, :]
    tl.store(ids_out + out + slots[None, :], tl.broadcast_to(unused[:, None], [R, S]), mask=idle)
    tl.store(weights_out + out + slots[None, :], tl.zeros([R, S], dtype=tl.float32), mask=idle)

    tl.atomic_add(histogram + ids, kept.to(tl.int64), mask=kept)
    tl.atomic_add(histogram + router_ids, put_back.to(tl.int64), mask=put_back)
    tl.atomic_add(histogram + EXPERTS, tl.sum(valid.to(tl.int64), axis=0))
    tl.atomic_add(histogram + EXPERTS + 1, tl.sum(tl.where(valid, taken, 0).to(tl.int64), axis=0))
    if HAS_TOKENS:
        token = tl.load(token_index + row, mask=valid, other=-1)
        counted = token >= 0
        # A token has one row in a layer, so nobody else is writing here.
        at = by_token + token * 3
        tl.store(at, tl.load(at, mask=counted, other=0) + active, mask=counted)
        tl.store(at + 1, tl.load(at + 1, mask=counted, other=0) + taken, mask=counted)
        tl.store(at + 2, tl.load(at + 2, mask=counted, other=0) + 1, mask=counted)


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
    """See `sluice.kernels.ops.route_topk.route_topk`; always `width` wide."""
    count, experts = logits.shape
    weights = torch.empty((count, width), dtype=torch.float32, device=logits.device)
    ids = torch.empty((count, width), dtype=torch.int32, device=logits.device)
    block, per_program = blocks(experts)
    _route[(triton.cdiv(count, per_program),)](
        logits,
        *logits.stride(),
        stock.weights,
        stock.ids,
        rows.policy_index,
        rows.token_index,
        rows.remix_index,
        rows.set_index,
        shared.references,
        shared.alpha,
        shared.top,
        shared.members,
        table.limits,
        table.cuts,
        table.bias,
        table.marks,
        table.forced_weight,
        counts.histogram[moe_index],
        counts.by_token,
        router.correction,
        weights,
        ids,
        count,
        router.scale,
        width,
        TOP_K=router.top_k,
        SIGMOID=router.sigmoid,
        RENORMALIZE=router.renormalize,
        GROUPS=router.groups,
        TOPK_GROUP=router.topk_group,
        REPEAT=repeat,
        HAS_STOCK=stock.ids.numel() > 0,
        HAS_REMIX=rows.remix_index.numel() > 0,
        HAS_SETS=rows.set_index.numel() > 0,
        HAS_TOKENS=counts.by_token.numel() > 0,
        CORRECTED=router.correction.numel() > 0,
        EXPERTS=experts,
        R=per_program,
        E=block,
        S=triton.next_power_of_2(width),
        U=triton.next_power_of_2(router.top_k),
    )
    return weights, ids
