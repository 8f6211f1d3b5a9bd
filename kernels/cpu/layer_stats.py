"""`layer_stats` on a CPU; arguments are in `sluice.kernels.ops.layer_stats`."""

from __future__ import annotations

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.ops.layer_stats import SMALLEST

_LANES = 32
"""Sums that are kept side by side: as many additions do not wait for each other."""
_SMALLEST = np.float32(SMALLEST)


def layer_stats(delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """See `sluice.kernels.ops.layer_stats.layer_stats`."""
    stats = np.empty((len(delta), 3), dtype=np.float32)
    deltas, befores = _numbers(delta), _numbers(before)
    paired = residual.numel() > 0
    _compare(deltas, _numbers(residual) if paired else deltas, befores, paired, stats)
    return torch.from_numpy(stats)


def _numbers(stream: torch.Tensor) -> Array:
    return stream.float().contiguous().numpy()


@compiled
def _compare(deltas: Array, residuals: Array, befores: Array, paired: bool, stats: Array) -> None:
    rows, hidden = deltas.shape
    summed = np.empty(hidden if paired else 0, dtype=np.float32)
    squares = np.empty(_LANES, dtype=np.float32)
    squares_before = np.empty(_LANES, dtype=np.float32)
    products = np.empty(_LANES, dtype=np.float32)
    whole = hidden // _LANES * _LANES
    for r in range(rows):
        after, before = deltas[r], befores[r]
        if paired:
            residual = residuals[r]
            for c in range(hidden):
                summed[c] = after[c] + residual[c]
            after = summed
        squares[:], squares_before[:], products[:] = 0.0, 0.0, 0.0
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                a, b = after[start + lane], before[start + lane]
                squares[lane] += a * a
                squares_before[lane] += b * b
                products[lane] += a * b
        for c in range(whole, hidden):
            a, b = after[c], before[c]
            squares[c - whole] += a * a
            squares_before[c - whole] += b * b
            products[c - whole] += a * b
        length = np.float32(np.sqrt(squares.sum()))
        length_before = np.float32(np.sqrt(squares_before.sum()))
        stats[r, 0] = length
        stats[r, 1] = length - length_before
        stats[r, 2] = products.sum() / max(length * length_before, _SMALLEST)
