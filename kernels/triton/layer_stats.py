"""`layer_stats` in Triton; arguments are in `sluice.kernels.ops.layer_stats`."""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.layer_stats import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_BLOCK = 1024
"""Numbers of each stream that a program holds at a time."""


@triton.jit
def _compare(
    deltas: tl.tensor,
    delta_row: tl.tensor,
    delta_column: tl.tensor,
    residuals: tl.tensor,
    residual_row: tl.tensor,
    residual_column: tl.tensor,
    befores: tl.tensor,
    before_row: tl.tensor,
    before_column: tl.tensor,
    stats: tl.tensor,
    rows: int,
    hidden: int,
    PAIR: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < rows
    # Sums of every lane, added up at the end: no lane waits for another on the way.
    squares = tl.zeros([R, B], dtype=tl.float32)
    squares_before = tl.zeros([R, B], dtype=tl.float32)
    products = tl.zeros([R, B], dtype=tl.float32)
    for start in range(0, hidden, B):
        column = start + tl.arange(0, B)
        inside = valid[:, None] & (column < hidden)[None, :]
        at = deltas + row[:, None] * delta_row + column[None, :] * delta_column
        after = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = befores + row[:, None] * before_row + column[None, :] * before_column
        before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if PAIR:
            at = residuals + row[:, None] * residual_row + column[None, :] * residual_column
            after += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        squares += after * after
        squares_before += before * before
        products += after * before
    length = tl.sqrt_rn(tl.sum(squares, axis=1))
    length_before = tl.sqrt_rn(tl.sum(squares_before, axis=1))
    cosine = tl.sum(products, axis=1) / tl.maximum(length * length_before, _SMALLEST)
    tl.store(stats + row * 3, length, mask=valid)
    tl.store(stats + row * 3 + 1, length - length_before, mask=valid)
    tl.store(stats + row * 3 + 2, cosine, mask=valid)


def layer_stats(delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """See `sluice.kernels.ops.layer_stats.layer_stats`."""
    rows, hidden = delta.shape
    stats = torch.empty((rows, 3), dtype=torch.float32, device=delta.device)
    pair = residual.numel() > 0
    block = min(_BLOCK, triton.next_power_of_2(hidden))
    per_program = max(1, min(16, _BLOCK // block))
    _compare[(triton.cdiv(rows, per_program),)](
        delta,
        *delta.stride(),
        residual,
        *(residual.stride() if pair else (0, 1)),
        before,
        *before.stride(),
        stats,
        rows,
        hidden,
        PAIR=pair,
        R=per_program,
        B=block,
    )
    return stats
