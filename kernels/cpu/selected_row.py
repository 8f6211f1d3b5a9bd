"""Selection scores of one row to its experts and what they weigh; part of the CPU's `route_topk`.

A row's experts are `slots[:active]`, best first, and `held` what each weighs before scaling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import best_of
from sluice.kernels.ops.routing_args import DROPPED, FORCED, PROTECTED


@compiled
def keep_within(within: Array, marks: Array, own: Array, choice: Array) -> None:
    """Leave the row its set, what is always selected, and protected experts it would have."""
    for e in range(len(choice)):
        if within[e] or choice[e] == np.inf:
            continue
        spared = False
        if marks[e] & PROTECTED:
            for slot in range(len(own)):
                spared |= own[slot] == e
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
    held: Array,
    order: Array,
    keys: Array,
) -> int:
    """Write the row's experts to `slots` and their scores to `held`; how many there are."""
    best_of(choice, len(choice), k, slots, keys)
    count = 0
    first = np.float32(0.0)
    for slot in range(k):
        e = slots[slot]
        if choice[e] > -np.inf and not marks[e] & DROPPED:
            slots[count], held[count] = e, scores[e]
            first = max(first, scores[e])
            count += 1
    if ratio > 0:
        kept = 0
        for slot in range(count):
            if held[slot] >= ratio * first or marks[slots[slot]] & FORCED:
                slots[kept], held[kept] = slots[slot], held[slot]
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
        best_of(held, count, count, order, keys)
        before = np.float32(0.0)
        for rank in range(count):
            slot = order[rank]
            stays = before <= most or marks[slots[slot]] & FORCED
            before += held[slot]
            if not stays:
                slots[slot] = -1
        kept = 0
        for slot in range(count):
            if slots[slot] >= 0:
                slots[kept], held[kept] = slots[slot], held[slot]
                kept += 1
        count = kept
    return count


@compiled
def put_back(
    scores: Array, marks: Array, own: Array, slots: Array, held: Array, active: int
) -> tuple[int, int]:
    """Append protected experts of the router's own choice; experts, and how many are missing."""
    selected = active
    taken = 0
    for rank in range(len(own)):
        found = False
        for slot in range(selected):
            found |= slots[slot] == own[rank]
        if found:
            continue
        if marks[own[rank]] & PROTECTED:
            slots[active], held[active] = own[rank], scores[own[rank]]
            active += 1
        else:
            taken += 1
    return active, taken


@compiled
def weigh_forced(
    marks: Array, forced_weight: Array, slots: Array, held: Array, active: int
) -> None:
    """Give what is always selected its weight in place of its score."""
    total = np.float32(0.0)
    others = 0
    for slot in range(active):
        if not marks[slots[slot]] & FORCED:
            total += held[slot]
            others += 1
    for slot in range(active):
        e = slots[slot]
        if marks[e] & FORCED:
            if not np.isnan(forced_weight[e]):
                held[slot] = forced_weight[e]
            elif others:
                # Where everything is forced there is no mean, and experts weigh what they scored.
                held[slot] = total / np.float32(others)
