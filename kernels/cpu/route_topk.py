"""`route_topk` and `router_scores` on a CPU; the rules and arguments are in `sluice.kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import best_of, choice_row, remix_row, score_row
from sluice.kernels.cpu.selected_row import keep_within, put_back, select_row, weigh_forced
from sluice.kernels.ops.route_topk import SMALLEST
from sluice.kernels.ops.routing_args import (
    ACTIVE,
    CHANGES,
    FORCED,
    MASKED,
    RANK,
    RATIO,
    ROUTED,
    ROWS,
    TAKEN,
    TOP_P,
    K,
)

Tensors = Any  # A list, or one of the groups of `sluice.kernels.ops.routing_args`.

_NOTHING = (np.empty((0, 0), dtype=np.float32), np.empty((0, 0), dtype=np.int32))
_SMALLEST = np.float32(SMALLEST)


def route_topk(
    logits: torch.Tensor,
    stock: Tensors,
    rows: Tensors,
    shared: Tensors,
    table: Tensors,
    counts: Tensors,
    correction: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.route_topk.route_topk`; as wide as the fullest row needs."""
    *numbers, width, _ = rest
    weights = np.empty((len(logits), width), dtype=np.float32)
    ids = np.empty((len(logits), width), dtype=np.int32)
    used = _route(
        plain(logits),
        *(_arrays(stock) or _NOTHING),
        *_arrays(rows),
        *_arrays(shared),
        *_arrays(table),
        *_arrays(counts),
        correction.numpy(),
        *numbers,
        weights,
        ids,
    )
    if used < width:
        # vLLM's CPU kernel reads memory, not strides.
        weights = np.ascontiguousarray(weights[:, :used])
        ids = np.ascontiguousarray(ids[:, :used])
    return torch.from_numpy(weights), torch.from_numpy(ids)


def router_scores(
    logits: torch.Tensor,
    rows: Tensors,
    shared: Tensors,
    table: Tensors,
    correction: torch.Tensor,
    *numbers: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.router_scores.router_scores`."""
    scores = np.empty(logits.shape, dtype=np.float32)
    choice = np.empty(logits.shape, dtype=np.float32)
    _scores(
        plain(logits),
        *_arrays(rows),
        *_arrays(shared),
        *_arrays(table),
        correction.numpy(),
        *numbers,
        scores,
        choice,
    )
    return torch.from_numpy(scores), torch.from_numpy(choice)


def count_selections(ids: torch.Tensor, owners: torch.Tensor, counts: Tensors, place: int) -> None:
    """See `sluice.kernels.ops.route_topk.count_selections`."""
    _count(ids.contiguous().numpy(), owners.numpy(), *_arrays(counts), place)


def plain(logits: torch.Tensor) -> Any:
    """Logits as a contiguous fp32 array; no copy if they are that."""
    return logits.float().contiguous().numpy()


def _arrays(group: Tensors) -> tuple[Any, ...]:
    """Arrays of a group; `stock`, and any group of a compiled graph, is a plain list."""
    if isinstance(group, list):
        return tuple(tensor.numpy() for tensor in group)
    arrays: tuple[Any, ...] = group.arrays
    return arrays


@compiled
def _route(
    logits: Array,
    stock_weights: Array,
    stock_ids: Array,
    policies: Array,
    owners: Array,
    pulls: Array,
    sets: Array,
    references: Array,
    alpha: Array,
    top: Array,
    within: Array,
    limits: Array,
    cuts: Array,
    bias: Array,
    marks: Array,
    forced_weight: Array,
    counts: Array,
    ran: Array,
    correction: Array,
    place: int,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    groups: int,
    topk_group: int,
    weights: Array,
    ids: Array,
) -> int:
    """Write `weights` and `ids`, add to `counts` and `ran`; how much the fullest row needs."""
    rows, experts = logits.shape
    histogram = counts[place]
    scores = np.empty(experts, dtype=np.float32)
    usual = np.empty(experts, dtype=np.float32)
    choice = np.empty(experts, dtype=np.float32)
    order = np.empty(experts, dtype=np.int64)
    keys = np.empty(experts, dtype=np.int64)
    reach = np.empty(groups, dtype=np.float32)
    own = np.empty(top_k, dtype=np.int64)
    slots = np.empty(experts + top_k, dtype=np.int64)
    held = np.empty(experts + top_k, dtype=np.float32)
    widest = 1
    for r in range(rows):
        p = policies[r]
        pull = pulls[r] if len(pulls) else -1
        shared = sets[r] if len(sets) else -1
        if p == 0 and pull < 0 and shared < 0 and len(stock_ids):
            active, taken = top_k, 0
            for slot in range(top_k):
                ids[r, slot] = stock_ids[r, slot]
                weights[r, slot] = stock_weights[r, slot]
        else:
            score_row(logits[r], sigmoid, scores)
            choice_row(
                scores, correction, bias[0], marks[0], groups, topk_group, order, keys, reach, usual
            )
            changes = limits[p, CHANGES] != 0
            if pull >= 0:
                remix_row(scores, references[pull], alpha[pull], top[pull], order, keys)
            if changes or pull >= 0:
                choice_row(
                    scores,
                    correction,
                    bias[p],
                    marks[p],
                    groups,
                    topk_group,
                    order,
                    keys,
                    reach,
                    choice,
                )
                for e in range(experts):
                    if marks[p, e] & FORCED:
                        choice[e] = np.inf
            else:
                # `choice[:] = usual` would take longer over its checks than over the numbers.
                for e in range(experts):
                    choice[e] = usual[e]
            # What the router selects on its own matters only to rows that may select otherwise.
            differs = changes or pull >= 0 or shared >= 0 or limits[p, K] > top_k
            if differs:
                best_of(usual, experts, top_k, own, keys)
            if shared >= 0:
                keep_within(within[shared], marks[p], own, choice)
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
                    held,
                    order,
                    keys,
                )
                taken = top_k - active
                if differs:
                    active, taken = put_back(scores, marks[p], own, slots, held, active)
                if changes:
                    weigh_forced(marks[p], forced_weight[p], slots, held, active)
                total = np.float32(1.0)
                if renormalize:
                    total = np.float32(0.0)
                    for slot in range(active):
                        # A mask may leave only scores too small for fp32; they share alike.
                        held[slot] = max(held[slot], _SMALLEST)
                        total += held[slot]
                for slot in range(active):
                    ids[r, slot] = slots[slot]
                    weights[r, slot] = held[slot] / total * scale
        if active == 0:
            # A row of NaN selects nothing, and the kernel of the experts reads what an id names.
            ids[r, 0] = slots[0]
        for slot in range(active, ids.shape[1]):
            ids[r, slot] = ids[r, 0]
            weights[r, slot] = 0.0
        for slot in range(active):
            histogram[ids[r, slot]] += 1
        histogram[MASKED] += taken
        if len(ran) and owners[r] >= 0:
            ran[owners[r], ACTIVE] += active
            ran[owners[r], TAKEN] += taken
            ran[owners[r], ROUTED] += 1
        widest = max(widest, active)
    histogram[ROWS] += rows
    return widest


@compiled
def _scores(
    logits: Array,
    policies: Array,
    owners: Array,
    pulls: Array,
    sets: Array,
    references: Array,
    alpha: Array,
    top: Array,
    within: Array,
    limits: Array,
    cuts: Array,
    bias: Array,
    marks: Array,
    forced_weight: Array,
    correction: Array,
    sigmoid: bool,
    groups: int,
    topk_group: int,
    scores: Array,
    choice: Array,
) -> None:
    rows, experts = logits.shape
    order = np.empty(experts, dtype=np.int64)
    keys = np.empty(experts, dtype=np.int64)
    reach = np.empty(groups, dtype=np.float32)
    for r in range(rows):
        p = policies[r]
        score_row(logits[r], sigmoid, scores[r])
        if len(pulls) and pulls[r] >= 0:
            pull = pulls[r]
            remix_row(scores[r], references[pull], alpha[pull], top[pull], order, keys)
        choice_row(
            scores[r],
            correction,
            bias[p],
            marks[p],
            groups,
            topk_group,
            order,
            keys,
            reach,
            choice[r],
        )


@compiled
def _count(ids: Array, owners: Array, counts: Array, ran: Array, place: int) -> None:
    rows, slots = ids.shape
    histogram = counts[place]
    for r in range(rows):
        for slot in range(slots):
            histogram[ids[r, slot]] += 1
        if len(ran) and owners[r] >= 0:
            ran[owners[r], ACTIVE] += slots
            ran[owners[r], ROUTED] += 1
    histogram[ROWS] += rows
