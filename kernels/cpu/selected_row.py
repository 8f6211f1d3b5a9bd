"""Selection scores of one row to its experts and what they weigh; part of the CPU's `route_topk`.

A row's experts are `slots[:active]`, best first; `slot_scores` is what each weighs before scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import best_of
from sluice.kernels.ops.routing_args import DROPPED, FORCED, PROTECTED


@compiled
def keep_within(members: Array, marks: Array, router_ids: Array, choice: Array) -> None:
    """Leave a row its set, what is always selected, and what it protects of the router's choice."""
    for e in range(len(choice)):
        if members[e] or choice[e] == np.inf:
            continue
        spared = False
        if marks[e] & PROTECTED:
            for slot in range(len(router_ids)):
                spared |= router_ids[slot] == e
        if not spared:
            choice[e] = -np.inf


@compiled
def select_row(
    scores: Array,
    choice: Array,
    marks: Array,
    k: int,
    ratio: Any,
    top_p: Any,
    sigmoid: bool,
    slots: Array,
    slot_scores: Array,
    order: Array,
    keys: Array,
) -> int:
    """Write the row's experts to `slots` and their scores to `slot_scores`; how many there are."""
    best_of(choice, len(choice), k, slots, keys)
    count = 0
    first = np.float32(0.0)
    for slot in range(k):
        e = slots[slot]
        if choice[e] > -np.inf and not marks[e] & DROPPED:
            slots[count], slot_scores[count] = e, scores[e]
            first = max(first, scores[e])
            count += 1
    if ratio > 0:
        kept = 0
        for slot in range(count):
            if slot_scores[slot] >= ratio * first or marks[slots[slot]] & FORCED:
                slots[kept], slot_scores[kept] = slots[slot], slot_scores[slot]
                kept += 1
        count = kept
    if top_p < np.inf:
        most = top_p
        if sigmoid:
            total = np.float32(0.0)
            for e in range(len(scores)):
                total += scores[e]
            most = top_p * total
        # By score: a bias or a correction ranks otherwise.
        best_of(slot_scores, count, count, order, keys)
        before = np.float32(0.0)
        for rank in range(count):
            slot = order[rank]
            stays = before <= most or marks[slots[slot]] & FORCED
            before += slot_scores[slot]
            if not stays:
                slots[slot] = -1
        kept = 0
        for slot in range(count):
            if slots[slot] >= 0:
                slots[kept], slot_scores[kept] = slots[slot], slot_scores[slot]
                kept += 1
        count = kept
    return count


@compiled
def put_back(
    scores: Array, marks: Array, router_ids: Array, slots: Array, slot_scores: Array, active: int
) -> tuple[int, int]:
    """Append protected experts of the router's own choice; experts, and how many are missing."""
    selected = active
    taken = 0
    for rank in range(len(router_ids)):
        present = False
        for slot in range(selected):
            present |= slots[slot] == router_ids[rank]
        if present:
            continue
        if marks[router_ids[rank]] & PROTECTED:
            slots[active], slot_scores[active] = router_ids[rank], scores[router_ids[rank]]
            active += 1
        else:
            taken += 1
    return active, taken


@compiled
def weigh_forced(
    marks: Array, forced_weight: Array, slots: Array, slot_scores: Array, active: int
) -> None:
    """Give what is always selected its weight in place of its score."""
    total = np.float32(0.0)
    others = 0
    for slot in range(active):
        if not marks[slots[slot]] & FORCED:
            total += slot_scores[slot]
            others += 1
    for slot in range(active):
        e = slots[slot]
        if marks[e] & FORCED:
            if not np.isnan(forced_weight[e]):
                slot_scores[slot] = forced_weight[e]
            elif others:
                # Where everything is forced there is no mean, and experts weigh what they scored.
                slot_scores[slot] = total / np.float32(others)
