"""Router logits of one row to selection scores: what the CPU's routing operations share.

In machine code, as a PyTorch operator costs more than its arithmetic on 64 experts. All arrays are
contiguous; the rules are those of `sluice.kernels.ops.router_scores`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sluice.kernels.cpu.exponential import exponential
from sluice.kernels.cpu.jit import Array, compiled, compiled_sums
from sluice.kernels.ops.routing_args import FORCED

_ZERO, _ONE, _NAN = (np.float32(value) for value in (0.0, 1.0, np.nan))
_SIGN, _MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
_WORD, _LOW = np.int64(32), np.int64(0xFFFFFFFF)
_TAKEN = np.int64(-(2**63))
"""Less than any key."""


def fp32_array(logits: torch.Tensor) -> Any:
    """Logits as a contiguous fp32 array; no copy if they are that."""
    return logits.float().contiguous().numpy()


@compiled_sums
def score_row(logits: Array, sigmoid: bool, scores: Array) -> None:
    """Write the scores of one row, fp32, (experts,)."""
    if sigmoid:
        for e in range(len(logits)):
            scores[e] = _ONE / (_ONE + exponential(-logits[e]))
        return
    best = _largest(logits)
    total = _ZERO
    for e in range(len(logits)):
        scores[e] = exponential(logits[e] - best)
        total += scores[e]
    for e in range(len(logits)):
        scores[e] /= total


@compiled
def best_of(values: Array, count: int, k: int, ids: Array, keys: Array) -> None:
    """Write the indices of the largest values, best first; of equals the first, NaN before all.

    Not a partition: which of equals it would take depends on `k`, and so a row's on neighbours'.

    Args:
        values: fp32, (count,) or more, of which the rest is left out.
        count: how many there are.
        k: how many are wanted, `count` or less.
        ids: where to write, int64, (k,) or more.
        keys: scratch, int64, (count,) or more.
    """
    for e in range(count):
        # Not -0, which is equal to 0, nor a NaN of either sign.
        value = values[e] + _ZERO if values[e] == values[e] else _NAN
        keys[e] = (np.int64(_ordered(value)) << _WORD) + np.int64(count - 1 - e)
    for slot in range(k):
        best = _TAKEN
        for e in range(count):
            best = max(best, keys[e])
        ids[slot] = count - 1 - (best & _LOW)
        keys[ids[slot]] = _TAKEN


@compiled
def _largest(values: Array) -> np.float32:
    """Found among integers, as no loop over comparisons of floats becomes vector code."""
    best = _ordered(values[0])
    for e in range(1, len(values)):
        best = max(best, _ordered(values[e]))
    return np.int32(best ^ ((best >> _SIGN) & _MAGNITUDE)).view(np.float32)


@compiled
def _ordered(value: np.float32) -> np.int32:
    """An integer for each number, in the numbers' order; those of NaN are beyond infinity's."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> _SIGN) & _MAGNITUDE))


@compiled
def remix_row(
    scores: Array, reference: Array, alpha: float, top: int, ids: Array, keys: Array
) -> None:
    """Pull scores towards a reference over the row's `top` best.

    `ids` and `keys` are scratch, int64, (experts,).
    """
    top = min(top, len(scores))
    best_of(scores, len(scores), top, ids, keys)
    mass = np.float32(0.0)
    reference_mass = np.float32(0.0)
    for slot in range(top):
        mass += scores[ids[slot]]
        reference_mass += reference[ids[slot]]
    if not reference_mass > 0:
        return
    rest = np.float32(1.0) - alpha
    for slot in range(top):
        e = ids[slot]
        scores[e] = alpha * scores[e] + rest * (reference[e] / reference_mass * mass)


@compiled
def choice_row(
    scores: Array,
    correction: Array,
    bias: Array,
    marks: Array,
    groups: int,
    topk_group: int,
    ids: Array,
    keys: Array,
    group_scores: Array,
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
        ids: scratch, int64, (experts,).
        keys: the same.
        group_scores: scratch, fp32, (groups,).
        choice: where to write, fp32, (experts,).
    """
    experts = len(scores)
    if len(correction):
        # Correction first, as PyTorch adds: fp32 sums depend on the order.
        for e in range(experts):
            choice[e] = (scores[e] + correction[e]) + bias[e]
    else:
        for e in range(experts):
            choice[e] = scores[e] + bias[e]
    if groups > 1:
        size = experts // groups
        for g in range(groups):
            first = second = np.float32(-np.inf)
            has_forced = False
            for e in range(g * size, (g + 1) * size):
                if choice[e] > first:
                    first, second = choice[e], first
                elif choice[e] > second:
                    second = choice[e]
                has_forced |= (marks[e] & FORCED) != 0
            # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
            group_scores[g] = first + second if len(correction) and size > 1 else first
            if has_forced:
                group_scores[g] = np.inf
        best_of(group_scores, groups, topk_group, ids, keys)
        for g in range(groups):
            inside = False
            for slot in range(topk_group):
                inside |= ids[slot] == g
            if not inside:
                choice[g * size : (g + 1) * size] = -np.inf
