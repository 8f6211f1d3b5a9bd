"""`exit_decision` on a CPU; rules and arguments are in `sluice.kernels.ops.exit_decision`.

A row is read twice, the second time out of the processor's cache: for the two largest logits, and
relative to the largest for the sums.
"""

from __future__ import annotations

import numpy as np
import torch

from sluice.kernels.cpu.exponential import share_of_largest
from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.ops.exit_decision import CONFIDENCE, NOTHING

_LANES = 64
"""Tokens that are taken side by side; nothing is added up across them until the row's end, so that
loops over them become vector code."""
_ONE, _OUT = np.float32(1.0), np.float32(-np.inf)
_NOTHING = np.float32(NOTHING)


def exit_decision(
    logits: torch.Tensor, threshold: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.exit_decision.exit_decision`."""
    stats = np.empty((len(logits), 4), dtype=np.float32)
    leaves = np.empty(len(logits), dtype=np.bool_)
    _decide(
        logits.float().contiguous().numpy(),
        threshold.contiguous().numpy(),
        measure == CONFIDENCE,
        stats,
        leaves,
    )
    return torch.from_numpy(stats), torch.from_numpy(leaves)


@compiled
def _decide(logits: Array, thresholds: Array, confident: bool, stats: Array, leaves: Array) -> None:
    rows, vocabulary = logits.shape
    whole = vocabulary // _LANES * _LANES
    rest = np.full(_LANES, _OUT, dtype=np.float32)
    for r in range(rows):
        rest[: vocabulary - whole] = logits[r, whole:]
        first, second, broken = _best_two(logits[r, :whole], rest)
        if broken:
            stats[r], leaves[r] = np.nan, False
            continue
        if first == _OUT:
            stats[r], stats[r, 3], leaves[r] = _OUT, np.nan, False
            continue
        total, weighted = _sums(logits[r, :whole], rest, first)
        spread = np.log(total)
        entropy = spread - weighted / total
        stats[r, 0], stats[r, 1] = first, second
        stats[r, 2], stats[r, 3] = first + spread, entropy
        if confident:
            leaves[r] = (_ONE - np.exp(second - first)) / total >= thresholds[r]
        else:
            leaves[r] = entropy <= thresholds[r]


@compiled
def _best_two(row: Array, rest: Array) -> tuple[np.float32, np.float32, bool]:
    """The largest of `row` and `rest`, the second largest, and whether there is inf or NaN."""
    firsts = np.full(_LANES, _OUT, dtype=np.float32)
    seconds = np.full(_LANES, _OUT, dtype=np.float32)
    sound = np.ones(_LANES, dtype=np.int32)
    for start in range(0, len(row) + 1, _LANES):
        part = row[start : start + _LANES] if start < len(row) else rest
        for lane in range(_LANES):
            logit, first = part[lane], firsts[lane]
            sound[lane] &= np.int32(logit < np.inf)
            firsts[lane] = first if logit < first else logit
            lower = logit if logit < first else first
            seconds[lane] = lower if lower > seconds[lane] else seconds[lane]
    first, second = _OUT, _OUT
    for lane in range(_LANES):
        lower = min(first, firsts[lane])
        first = max(first, firsts[lane])
        second = max(second, lower, seconds[lane])
    return first, second, sound.sum() < _LANES


@compiled
def _sums(row: Array, rest: Array, first: np.float32) -> tuple[np.float32, np.float32]:
    """The sum of exponentials relative to `first`, and that of each times its logarithm."""
    totals = np.zeros(_LANES, dtype=np.float32)
    weighted = np.zeros(_LANES, dtype=np.float32)
    for start in range(0, len(row) + 1, _LANES):
        part = row[start : start + _LANES] if start < len(row) else rest
        for lane in range(_LANES):
            below = part[lane] - first
            below = below if below > _NOTHING else _NOTHING
            raised = share_of_largest(below)
            totals[lane] += raised
            weighted[lane] += raised * below
    return totals.sum(), weighted.sum()
