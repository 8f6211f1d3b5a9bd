"""`route_topk` and `router_scores` in Triton; rules and arguments are in `sluice.kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.route_topk import SMALLEST, UNUSED
from sluice.kernels.ops.routing_args import DROPPED, FORCED, PROTECTED
from sluice.kernels.triton.router_rows import choices, first_of, remixed, scored_rows

_DROPPED = tl.constexpr(DROPPED)
_FORCED = tl.constexpr(FORCED)
_PROTECTED = tl.constexpr(PROTECTED)
_UNUSED = tl.constexpr(UNUSED)
_SMALLEST = tl.constexpr(SMALLEST)
_BLOCK = 1024
"""Numbers that a program holds at a time: rows times padded experts."""


@triton.jit
def _picked(chosen: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The entry of `block` at the one place of each row where `chosen`."""
    return tl.sum(tl.where(chosen, block, 0), axis=1)


@triton.jit
def _route(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    stock_weights: tl.tensor,
    stock_ids: tl.tensor,
    policies: tl.tensor,
    owners: tl.tensor,
    pulls: tl.tensor,
    sets: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    within: tl.tensor,
    limits: tl.tensor,
    cuts: tl.tensor,
    biases: tl.tensor,
    marks: tl.tensor,
    forced_weights: tl.tensor,
    histogram: tl.tensor,
    ran: tl.tensor,
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
    HAS_PULLS: tl.constexpr,
    HAS_SETS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    CORRECTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
) -> None:
    row, live, places, inside, raw = scored_rows(
        logits, row_stride, column_stride, rows, SIGMOID, EXPERTS, R, E
    )
    policy = tl.load(policies + row, mask=live, other=0)
    of_policy = policy[:, None] * EXPERTS + places[None, :]
    bias = tl.load(biases + of_policy, mask=inside, other=0.0)
    mark = tl.load(marks + of_policy, mask=inside, other=0).to(tl.int32)
    given = tl.load(forced_weights + of_policy, mask=inside, other=0.0)
    k = tl.load(limits + policy * 3, mask=live, other=1)
    rank = tl.load(limits + policy * 3 + 1, mask=live, other=-1)
    ratio = tl.load(cuts + policy * 2, mask=live, other=0.0)
    top_p = tl.load(cuts + policy * 2 + 1, mask=live, other=float("inf"))
    forced = (mark & _FORCED) != 0

    scores = raw
    correction = tl.zeros_like(raw)
    pull = tl.zeros_like(policy) - 1
    if HAS_PULLS:
        pull = tl.load(pulls + row, mask=live, other=-1)
        scores = remixed(raw, places, inside, pull, references, alphas, tops, EXPERTS)
    if CORRECTED:
        correction += tl.load(corrections + places, mask=places < EXPERTS, other=0.0)[None, :]
    nothing = tl.zeros_like(raw)
    usual = choices(
        raw, correction, nothing, nothing > 0.0, places, inside,
        CORRECTED, GROUPS, TOPK_GROUP, EXPERTS,
    )  # fmt: skip
    choice = choices(
        scores, correction, bias, forced, places, inside, CORRECTED, GROUPS, TOPK_GROUP, EXPERTS
    )
    choice = tl.where(forced, float("inf"), choice)

    # The router's own choice: what a policy takes away is counted, what is protected comes back.
    ranks = tl.arange(0, U)
    own_ids = tl.zeros([R, U], dtype=tl.int32)
    own_held = tl.zeros([R, U], dtype=tl.float32)
    own_marks = tl.zeros([R, U], dtype=tl.int32)
    own = nothing > 0.0
    for slot in range(TOP_K):
        _, place = first_of(usual, places)
        chosen = places[None, :] == place[:, None]
        own = own | chosen
        here = (ranks == slot)[None, :]
        own_ids = tl.where(here, place[:, None], own_ids)
        own_held = tl.where(here, _picked(chosen, scores)[:, None], own_held)
        own_marks = tl.where(here, _picked(chosen, mark)[:, None], own_marks)
        usual = tl.where(chosen, float("-inf"), usual)

    shared = tl.zeros_like(policy) - 1
    if HAS_SETS:
        shared = tl.load(sets + row, mask=live, other=-1)
        bound = inside & (shared >= 0)[:, None]
        member = tl.load(within + shared[:, None] * EXPERTS + places[None, :], mask=bound, other=1)
        stays = (member != 0) | forced | (((mark & _PROTECTED) != 0) & own)
        choice = tl.where(stays, choice, float("-inf"))

    slots = tl.arange(0, S)
    ids = tl.zeros([R, S], dtype=tl.int32)
    held = tl.zeros([R, S], dtype=tl.float32)
    slot_marks = tl.zeros([R, S], dtype=tl.int32)
    slot_given = tl.zeros([R, S], dtype=tl.float32)
    kept = tl.zeros([R, S], dtype=tl.int32) > 0
    ranked = tl.zeros([R], dtype=tl.int32)
    for slot in range(tl.max(tl.maximum(k, rank + 1), axis=0)):
        value, place = first_of(choice, places)
        chosen = places[None, :] == place[:, None]
        here = (slots == slot)[None, :]
        ids = tl.where(here, place[:, None], ids)
        held = tl.where(here, _picked(chosen, scores)[:, None], held)
        slot_marks = tl.where(here, _picked(chosen, mark)[:, None], slot_marks)
        slot_given = tl.where(here, _picked(chosen, given)[:, None], slot_given)
        kept = kept | (here & (value > float("-inf"))[:, None] & (slot < k)[:, None])
        ranked = tl.where(rank == slot, place, ranked)
        choice = tl.where(chosen, float("-inf"), choice)

    kept = kept & ((slot_marks & _DROPPED) == 0)
    sparing = (slot_marks & _FORCED) != 0
    first = tl.max(tl.where(kept, held, 0.0), axis=1)
    kept = kept & ((held >= (ratio * first)[:, None]) | sparing)
    if tl.min(top_p, axis=0) < float("inf"):
        most = top_p
        if SIGMOID:
            most = top_p * tl.sum(scores, axis=1)
        has = tl.where(kept, held, 0.0)
        ahead = has[:, None, :] > has[:, :, None]
        ahead = ahead | ((has[:, None, :] == has[:, :, None]) & (slots[None, :] < slots[:, None]))
        before = tl.sum(tl.where(ahead, has[:, None, :], 0.0), axis=2)
        kept = kept & ((before <= most[:, None]) | sparing)

    alike = (own_ids[:, :, None] == ids[:, None, :]) & kept[:, None, :]
    found = tl.max(alike.to(tl.int32), axis=2) > 0
    missing = (ranks < TOP_K)[None, :] & ~found
    back = missing & ((own_marks & _PROTECTED) != 0)
    taken = tl.sum((missing & ~back).to(tl.int32), axis=1)

    others = kept & ~sparing
    count = tl.sum(others.to(tl.int32), axis=1) + tl.sum(back.to(tl.int32), axis=1)
    total = tl.sum(tl.where(others, held, 0.0), axis=1) + tl.sum(
        tl.where(back, own_held, 0.0), axis=1
    )
    mean = (total / tl.maximum(count, 1).to(tl.float32))[:, None]
    # Where everything is forced there is no mean, and experts weigh what they scored.
    unasked = tl.where((count > 0)[:, None], mean, held)
    weights = tl.where(slot_given == slot_given, slot_given, unasked)
    weights = tl.where(sparing, weights, held)
    if RENORMALIZE:
        # A mask may leave only experts whose scores are too small for fp32; they share alike.
        weights = tl.where(kept, tl.maximum(weights, _SMALLEST), 0.0)
        own_held = tl.where(back, tl.maximum(own_held, _SMALLEST), 0.0)
        total = (tl.sum(weights, axis=1) + tl.sum(own_held, axis=1))[:, None]
        total = tl.where(total > 0.0, total, 1.0)
        weights, own_held = weights / total, own_held / total
    weights, own_held = weights * scale, own_held * scale

    weak = (rank >= 0)[:, None]
    ids = tl.where(weak, ranked[:, None], ids)
    weights = tl.where(weak, scale, weights)
    kept = tl.where(weak, (slots == 0)[None, :], kept)
    back = back & ~weak
    taken = tl.where(rank >= 0, TOP_K - (rank < TOP_K).to(tl.int32), taken)
    if HAS_STOCK:
        left = live & (policy == 0) & (pull < 0) & (shared < 0)
        theirs = left[:, None] & (ranks < TOP_K)[None, :]
        at = row[:, None] * TOP_K + ranks[None, :]
        own_ids = tl.where(theirs, tl.load(stock_ids + at, mask=theirs, other=0), own_ids)
        own_held = tl.where(theirs, tl.load(stock_weights + at, mask=theirs, other=0.0), own_held)
        kept = kept & ~left[:, None]
        back = tl.where(left[:, None], theirs, back)
        taken = tl.where(left, 0, taken)

    kept, back = kept & live[:, None], back & live[:, None]
    numbers = kept.to(tl.int32)
    slot_at = tl.cumsum(numbers, axis=1) - 1
    selected = tl.sum(numbers, axis=1)
    back_at = selected[:, None] + tl.cumsum(back.to(tl.int32), axis=1) - 1
    active = selected + tl.sum(back.to(tl.int32), axis=1)
    out = row[:, None] * width
    tl.store(ids_out + out + slot_at, ids, mask=kept)
    tl.store(weights_out + out + slot_at, weights, mask=kept)
    tl.store(ids_out + out + back_at, own_ids, mask=back)
    tl.store(weights_out + out + back_at, own_held, mask=back)
    unused = tl.zeros([R], dtype=tl.int32) + _UNUSED
    if REPEAT:
        unused = _picked(kept & (slot_at == 0), ids) + _picked(back & (back_at == 0), own_ids)
    idle = live[:, None] & (slots >= active[:, None]) & (slots < width)[None, :]
    tl.store(ids_out + out + slots[None, :], tl.broadcast_to(unused[:, None], [R, S]), mask=idle)
    tl.store(weights_out + out + slots[None, :], tl.zeros([R, S], dtype=tl.float32), mask=idle)

    tl.atomic_add(histogram + ids, kept.to(tl.int64), mask=kept)
    tl.atomic_add(histogram + own_ids, back.to(tl.int64), mask=back)
    tl.atomic_add(histogram + EXPERTS, tl.sum(live.to(tl.int64), axis=0))
    tl.atomic_add(histogram + EXPERTS + 1, tl.sum(tl.where(live, taken, 0).to(tl.int64), axis=0))
    if HAS_TOKENS:
        owner = tl.load(owners + row, mask=live, other=-1)
        counted = owner >= 0
        # A token has one row in a layer, so nobody else is writing here.
        at = ran + owner * 3
        tl.store(at, tl.load(at, mask=counted, other=0) + active, mask=counted)
        tl.store(at + 1, tl.load(at + 1, mask=counted, other=0) + taken, mask=counted)
        tl.store(at + 2, tl.load(at + 2, mask=counted, other=0) + 1, mask=counted)


def route_topk(
    logits: torch.Tensor,
    stock: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    table: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
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
    """See `sluice.kernels.ops.route_topk.route_topk`; always `width` wide."""
    count, experts = logits.shape
    weights = torch.empty((count, width), dtype=torch.float32, device=logits.device)
    ids = torch.empty((count, width), dtype=torch.int32, device=logits.device)
    histogram, ran = counts
    block = triton.next_power_of_2(experts)
    per_program = max(1, min(16, _BLOCK // block))
    _route[(triton.cdiv(count, per_program),)](
        logits,
        *logits.stride(),
        *(stock or (weights, ids)),
        *rows,
        *shared,
        *table,
        histogram[place],
        ran,
        correction,
        weights,
        ids,
        count,
        scale,
        width,
        TOP_K=top_k,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        GROUPS=groups,
        TOPK_GROUP=topk_group,
        REPEAT=repeat,
        HAS_STOCK=bool(stock),
        HAS_PULLS=rows[2].numel() > 0,
        HAS_SETS=rows[3].numel() > 0,
        HAS_TOKENS=ran.numel() > 0,
        CORRECTED=correction.numel() > 0,
        EXPERTS=experts,
        R=per_program,
        E=block,
        S=triton.next_power_of_2(width),
        U=triton.next_power_of_2(top_k),
    )
    return weights, ids


@triton.jit
def _score(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    policies: tl.tensor,
    pulls: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    biases: tl.tensor,
    marks: tl.tensor,
    corrections: tl.tensor,
    scores_out: tl.tensor,
    choice_out: tl.tensor,
    rows: int,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    HAS_PULLS: tl.constexpr,
    CORRECTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
) -> None:
    row, live, places, inside, scores = scored_rows(
        logits, row_stride, column_stride, rows, SIGMOID, EXPERTS, R, E
    )
    policy = tl.load(policies + row, mask=live, other=0)
    of_policy = policy[:, None] * EXPERTS + places[None, :]
    bias = tl.load(biases + of_policy, mask=inside, other=0.0)
    forced = (tl.load(marks + of_policy, mask=inside, other=0).to(tl.int32) & _FORCED) != 0
    correction = tl.zeros_like(scores)
    if HAS_PULLS:
        pull = tl.load(pulls + row, mask=live, other=-1)
        scores = remixed(scores, places, inside, pull, references, alphas, tops, EXPERTS)
    if CORRECTED:
        correction += tl.load(corrections + places, mask=places < EXPERTS, other=0.0)[None, :]
    choice = choices(
        scores, correction, bias, forced, places, inside, CORRECTED, GROUPS, TOPK_GROUP, EXPERTS
    )
    at = row[:, None] * EXPERTS + places[None, :]
    tl.store(scores_out + at, scores, mask=inside)
    tl.store(choice_out + at, choice, mask=inside)


def router_scores(
    logits: torch.Tensor,
    rows: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    table: Sequence[torch.Tensor],
    correction: torch.Tensor,
    sigmoid: bool,
    groups: int,
    topk_group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.router_scores.router_scores`."""
    count, experts = logits.shape
    scores = torch.empty((count, experts), dtype=torch.float32, device=logits.device)
    choice = torch.empty_like(scores)
    block = triton.next_power_of_2(experts)
    per_program = max(1, min(16, _BLOCK // block))
    _score[(triton.cdiv(count, per_program),)](
        logits,
        *logits.stride(),
        rows[0],
        rows[2],
        *shared[:3],
        table[2],
        table[3],
        correction,
        scores,
        choice,
        count,
        SIGMOID=sigmoid,
        GROUPS=groups,
        TOPK_GROUP=topk_group,
        HAS_PULLS=rows[2].numel() > 0,
        CORRECTED=correction.numel() > 0,
        EXPERTS=experts,
        R=per_program,
        E=block,
    )
    return scores, choice
