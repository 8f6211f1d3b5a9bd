"""`exit_test` on a CPU; rules and arguments are in `sluice.kernels.exit_test`.

A row is read twice, the second time out of the processor's cache: for the two largest logits, and
relative to the largest for the sums.
"""

from __future__ import annotations

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.exit_test import CONFIDENCE, NOTHING

_LANES = 64
"""Tokens that are taken side by side; nothing is added up across them until the row's end, so that
loops over them become vector code."""
_ZERO, _HALF, _ONE, _OUT = (np.float32(value) for value in (0.0, 0.5, 1.0, -np.inf))
_NOTHING = np.float32(NOTHING)

# Cephes' expf: exp(x) = 2^n exp(y), y = x - n log 2 in two parts, and a polynomial of y.
_LOWEST = np.float32(-87.0)
"""Below it the exponential is taken as 0; relative to the largest logit's 1 it is nothing."""
_LOG2_E = np.float32(1.44269504088896341)
_LOG_2 = tuple(np.float32(part) for part in (0.693359375, -2.12194440e-4))
_TERMS = tuple(
    np.float32(term)
    for term in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)


def exit_test(
    logits: torch.Tensor, threshold: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.exit_test.exit_test`."""
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
    below = np.empty(_LANES, dtype=np.float32)
    polynomial = np.empty(_LANES, dtype=np.float32)
    exponents = np.empty(_LANES, dtype=np.int32)
    powers = exponents.view(np.float32)
    for start in range(0, len(row) + 1, _LANES):
        part = row[start : start + _LANES] if start < len(row) else rest
        for lane in range(_LANES):
            relative = part[lane] - first
            relative = relative if relative > _NOTHING else _NOTHING
            below[lane] = relative
            x = relative if relative > _LOWEST else _LOWEST
            n = np.floor(x * _LOG2_E + _HALF)
            y = x - n * _LOG_2[0] - n * _LOG_2[1]
            value = _TERMS[0] * y + _TERMS[1]
            value = value * y + _TERMS[2]
            value = value * y + _TERMS[3]
            value = value * y + _TERMS[4]
            value = value * y + _TERMS[5]
            polynomial[lane] = value * y * y + y + _ONE
            # A float's bits: its exponent, biased, above 23 of the mantissa.
            exponents[lane] = (np.int32(n) + np.int32(127)) << np.int32(23)
        for lane in range(_LANES):
            raised = polynomial[lane] * powers[lane] if below[lane] > _LOWEST else _ZERO
            totals[lane] += raised
            weighted[lane] += raised * below[lane]
    return totals.sum(), weighted.sum()
