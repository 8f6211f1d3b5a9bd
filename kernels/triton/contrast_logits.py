"""`contrast_logits` in Triton; rules and arguments are in `sluice.kernels.ops.contrast_logits`.

Whether a token is plausible hangs on its row's best, and how far down the others lie on the lowest
of the plausible. So the vocabulary is cut into tiles: a first kernel finds each tile's best, a
second the lowest of each tile that has a plausible token, and few tiles have one; the third writes.
Memory is read once for the best and once, cached as far as it fits, for writing; of the weak pass
only what is plausible is read.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.contrast_logits import IMPLAUSIBLE

_TILE = 4096
"""Tokens of a row that a program looks at."""
_FAR = tl.constexpr(IMPLAUSIBLE)


@triton.jit
def _tile(
    strong: tl.tensor, row_stride: tl.tensor, step: tl.tensor, vocabulary: int, T: tl.constexpr
) -> tl.tensor:
    """This program's tokens, where they are, which of them exist, and their logits, fp32."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    inside = token < vocabulary
    where = strong + row * row_stride + token * step
    plain = tl.load(where, mask=inside, other=float("-inf")).to(tl.float32)
    return row, token, inside, plain


@triton.jit
def _best(
    strong: tl.tensor,
    row_stride: tl.tensor,
    step: tl.tensor,
    bests: tl.tensor,
    vocabulary: int,
    tiles: int,
    T: tl.constexpr,
) -> None:
    row, _, _, plain = _tile(strong, row_stride, step, vocabulary, T)
    tl.store(bests + row * tiles + tl.program_id(1), tl.max(plain, axis=0))


@triton.jit
def _row_tiles(
    row: tl.tensor, parts: tl.tensor, tiles: int, nothing: float, C: tl.constexpr
) -> tl.tensor:
    """One number of each tile of a row."""
    tile = tl.arange(0, C)
    return tl.load(parts + row * tiles + tile, mask=tile < tiles, other=nothing)


@triton.jit
def _mixed(
    plain: tl.tensor,
    weak: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    row_stride: tl.tensor,
    step: tl.tensor,
    factor: tl.tensor,
    plausible: tl.tensor,
) -> tl.tensor:
    """Combined logits at plausible tokens."""
    where = weak + row * row_stride + token * step
    other = tl.load(where, mask=plausible, other=0.0).to(tl.float32)
    return (1.0 + factor) * plain - factor * other


@triton.jit
def _lowest(
    strong: tl.tensor,
    row_stride: tl.tensor,
    step: tl.tensor,
    weak: tl.tensor,
    weak_row_stride: tl.tensor,
    weak_step: tl.tensor,
    betas: tl.tensor,
    shares: tl.tensor,
    bests: tl.tensor,
    lowests: tl.tensor,
    vocabulary: int,
    tiles: int,
    T: tl.constexpr,
    C: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tile_at = row * tiles + tl.program_id(1)
    least = tl.max(_row_tiles(row, bests, tiles, float("-inf"), C), axis=0) + tl.load(shares + row)
    if tl.load(bests + tile_at) < least:
        tl.store(lowests + tile_at, float("inf"))
    else:
        _, token, inside, plain = _tile(strong, row_stride, step, vocabulary, T)
        plausible = inside & (plain >= least)
        factor = tl.load(betas + row)
        mixed = _mixed(plain, weak, row, token, weak_row_stride, weak_step, factor, plausible)
        tl.store(lowests + tile_at, tl.min(tl.where(plausible, mixed, float("inf")), axis=0))


@triton.jit
def _write(
    strong: tl.tensor,
    row_stride: tl.tensor,
    step: tl.tensor,
    weak: tl.tensor,
    weak_row_stride: tl.tensor,
    weak_step: tl.tensor,
    betas: tl.tensor,
    shares: tl.tensor,
    bests: tl.tensor,
    lowests: tl.tensor,
    mixed_out: tl.tensor,
    vocabulary: int,
    tiles: int,
    T: tl.constexpr,
    C: tl.constexpr,
) -> None:
    row, token, inside, plain = _tile(strong, row_stride, step, vocabulary, T)
    best = tl.max(_row_tiles(row, bests, tiles, float("-inf"), C), axis=0)
    floor = tl.min(_row_tiles(row, lowests, tiles, float("inf"), C), axis=0) - _FAR
    plausible = inside & (plain >= best + tl.load(shares + row))
    factor = tl.load(betas + row)
    mixed = _mixed(plain, weak, row, token, weak_row_stride, weak_step, factor, plausible)
    logits = tl.where(plausible, mixed, floor + (plain - best))
    tl.store(mixed_out + row * vocabulary + token, logits, mask=inside)


def contrast_logits(
    strong: torch.Tensor, weak: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """See `sluice.kernels.ops.contrast_logits.contrast_logits`."""
    rows, vocabulary = strong.shape
    mixed_out = torch.empty((rows, vocabulary), dtype=strong.dtype, device=strong.device)
    if not mixed_out.numel():
        return mixed_out
    tile = min(_TILE, triton.next_power_of_2(vocabulary))
    tiles = triton.cdiv(vocabulary, tile)
    parts = torch.empty((2, rows, tiles), dtype=torch.float32, device=strong.device)
    bests, lowests = parts
    # PyTorch's logarithm: with Triton's, a token on the edge could fall to the other side.
    shares = alpha.log()
    grid, block = (rows, tiles), triton.next_power_of_2(tiles)
    _best[grid](strong, *strong.stride(), bests, vocabulary, tiles, T=tile)
    logits = (strong, *strong.stride(), weak, *weak.stride())
    _lowest[grid](*logits, beta, shares, bests, lowests, vocabulary, tiles, T=tile, C=block)
    _write[grid](
        *logits, beta, shares, bests, lowests, mixed_out, vocabulary, tiles, T=tile, C=block
    )
    return mixed_out
