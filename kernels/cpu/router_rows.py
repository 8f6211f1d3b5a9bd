"""Router logits of one row to selection scores; what the CPU's routing operations share.

One pass per row in machine code: at 64 experts a PyTorch operator costs more than its arithmetic.
All arrays are contiguous; the rules are those of `sluice.kernels.route_topk`.
"""

from __future__ import annotations

import math

import numpy as np

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.route_columns import FORCED


@compiled
def score_row(logits: Array, sigmoid: bool, scores: Array) -> None:
    """Write the scores of one row, fp32, (experts,)."""
    if sigmoid:
        for e in range(len(logits)):
            scores[e] = np.float32(1.0) / (np.float32(1.0) + math.exp(-logits[e]))
        return
    best = logits[0]
    for e in range(1, len(logits)):
        best = max(best, logits[e])
    total = np.float32(0.0)
    for e in range(len(logits)):
        scores[e] = math.exp(logits[e] - best)
        total += scores[e]
    for e in range(len(logits)):
        scores[e] /= total


@compiled
def best_of(values: Array, k: int, ids: Array) -> None:
    """Write the places of the `k` largest values, best first; of equals the first.

    Not a partition: which of equals it would take depends on `k`, and so a row's on neighbours'.
    """
    held = 0
    for e in range(len(values)):
        value = values[e]
        if held == k and not value > values[ids[k - 1]]:
            continue
        if held < k:
            held += 1
        slot = held - 1
        while slot > 0 and value > values[ids[slot - 1]]:
            ids[slot] = ids[slot - 1]
            slot -= 1
        ids[slot] = e


@compiled
def remix_row(
    scores: Array, reference: Array, alpha: float, top: int, ids: Array, mixed: Array
) -> None:
    """Write scores pulled towards a reference over the row's `top` best; `ids` is scratch."""
    top = min(top, len(scores))
    best_of(scores, top, ids)
    mass = np.float32(0.0)
    weight = np.float32(0.0)
    for e in range(len(scores)):
        mixed[e] = scores[e]
    for slot in range(top):
        mass += scores[ids[slot]]
        weight += reference[ids[slot]]
    if not weight > 0:
        return
    rest = np.float32(1.0) - alpha
    for slot in range(top):
        e = ids[slot]
        mixed[e] = alpha * scores[e] + rest * (reference[e] / weight * mass)


@compiled
def choice_row(
    scores: Array,
    correction: Array,
    bias: Array,
    marks: Array,
    groups: int,
    topk_group: int,
    ids: Array,
    choice: Array,
) -> None:
    """Write selection scores: corrected, biased and limited to groups.

    Experts that are always selected have their own score here, and their group is in reach.

    Args:
        scores: of the row, re-mixed if that is asked.
        correction: fp32, (experts,) or (0,).
        bias: of the row's policy.
        marks: of the row's policy.
        groups: of the router.
        topk_group: groups that the row may choose from.
        ids: scratch, (experts,).
        choice: where to write, fp32, (experts,).
    """
    experts = len(scores)
    for e in range(experts):
        choice[e] = scores[e] + bias[e]
    if len(correction):
        # Correction first, as PyTorch adds: fp32 sums depend on the order.
        for e in range(experts):
            choice[e] = (scores[e] + correction[e]) + bias[e]
    if groups > 1:
        size = experts // groups
        reach = np.empty(groups, dtype=np.float32)
        for g in range(groups):
            first = second = np.float32(-np.inf)
            opened = False
            for e in range(g * size, (g + 1) * size):
                if choice[e] > first:
                    first, second = choice[e], first
                elif choice[e] > second:
                    second = choice[e]
                opened |= (marks[e] & FORCED) != 0
            # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
            reach[g] = first + second if len(correction) and size > 1 else first
            if opened:
                reach[g] = np.inf
        best_of(reach, topk_group, ids)
        for g in range(groups):
            inside = False
            for slot in range(topk_group):
                inside |= ids[slot] == g
            if not inside:
                choice[g * size : (g + 1) * size] = -np.inf
