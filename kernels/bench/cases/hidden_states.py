"""Cases of the operations on hidden states, keys and values."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from sluice.kernels.bench.agreement import Outputs, assert_same, within
from sluice.kernels.bench.cases.case import Case, Counterpart, nbytes
from sluice.kernels.bench.cases.counterparts import stock_fill
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.ops.kv_fill import kv_fill
from sluice.kernels.ops.layer_stats import CHANGE, COSINE, NORM, layer_stats
from sluice.kernels.ops.row_compact import row_compact, row_scatter

_BLOCK = 16
"""Slots in a block of the cache."""
_POSITIONS = 4096
_EPS = 1e-6
_COLUMNS = (NORM, CHANGE, COSINE)
_STATISTICS = 1e-4
"""Tolerance of norms of some 100, and of their difference."""


def layer_stats_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """What a layer changed, given vLLM's pair."""
    generator = shapes.generator(rows)
    before = _normal(shapes, generator, rows, shapes.hidden)
    residual = before.clone()
    delta = 0.5 * _normal(shapes, generator, rows, shapes.hidden)

    def plain() -> Outputs:
        after, base = delta.float() + residual.float(), before.float()
        length = after.norm(dim=-1)
        cosine = cosine_similarity(after, base, dim=-1)
        return length, length - base.norm(dim=-1), cosine

    def agreement(result: Outputs, expected: Outputs) -> None:
        for name, part, column in zip(("norm", "change", "cosine"), result, _COLUMNS, strict=True):
            assert_same(name, part, expected[0][:, column], _STATISTICS)

    return (
        Case(
            layer_stats,
            rows,
            (delta, residual, before),
            nbytes(delta, residual, before) + 12 * rows,
            agreement=within(_STATISTICS),
            counterparts=(Counterpart("PyTorch", plain, agreement),),
        ),
    )


def row_compact_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Every other row of twice as many; the reference is PyTorch's own `index_select`."""
    delta, residual, index = _pair(shapes, rows)
    # Half of the pair is read, and as much is written.
    moved = nbytes(index) + nbytes(delta, residual)
    return (Case(row_compact, rows, (delta, residual, index), moved, agreement=within(0.0, 0.0)),)


def row_scatter_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """And back; the reference is PyTorch's own `index_copy_`."""
    delta, residual, index = _pair(shapes, rows)
    compacted = (-delta[index], -residual[index])
    return (
        Case(
            row_scatter,
            rows,
            (delta, residual, index, *compacted),
            nbytes(index) + 2 * nbytes(compacted),
            mutated=(0, 1),
            agreement=within(0.0, 0.0),
        ),
    )


def kv_fill_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Keys with norm and rotary embedding and values, to slots all over a cache."""
    generator = shapes.generator(rows)
    size = (rows, shapes.heads, shapes.head_size)
    key, value = (_normal(shapes, generator, *size) for _ in range(2))
    blocks = 2 * -(-rows // _BLOCK)
    order = torch.rand(blocks * _BLOCK, generator=generator, device=shapes.device).argsort()
    slots = order[:rows].contiguous()
    positions = torch.randint(
        _POSITIONS, (rows,), generator=generator, device=shapes.device, dtype=torch.int64
    )
    cache = torch.zeros((2, blocks, _BLOCK, *size[1:]), dtype=shapes.dtype, device=shapes.device)
    weight = 1.0 + 0.1 * _normal(shapes, generator, shapes.head_size)
    angles = _angles(shapes)
    args = (key, value, positions, angles, slots, *cache.unbind(), weight, _EPS, True)
    # Of the table each row reads the line of its position.
    table = rows * angles.shape[1] * angles.itemsize
    stock = stock_fill(key, value, positions, angles, slots, cache.clone(), weight, _EPS)
    return (
        Case(
            kv_fill,
            rows,
            args,
            nbytes(positions, slots, weight) + table + 2 * nbytes(key, value),
            mutated=(5, 6),
            agreement=within(*[_rounding(shapes.dtype)] * 2),
            counterparts=stock,
        ),
    )


def _pair(shapes: Shapes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = shapes.generator(rows)
    delta, residual = (_normal(shapes, generator, 2 * rows, shapes.hidden) for _ in range(2))
    return delta, residual, torch.arange(0, 2 * rows, 2, device=shapes.device)


def _angles(shapes: Shapes) -> torch.Tensor:
    """Cosines, then sines, (positions, head_size)."""
    half = shapes.head_size // 2
    speeds = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    turns = torch.arange(_POSITIONS, dtype=torch.float64).unsqueeze(-1) * speeds
    return torch.cat([turns.cos(), turns.sin()], dim=-1).to(shapes.device, shapes.dtype)


def _normal(shapes: Shapes, generator: torch.Generator, *size: int) -> torch.Tensor:
    drawn = torch.randn(size, generator=generator, device=shapes.device)
    return drawn.to(shapes.dtype)


def _rounding(dtype: torch.dtype) -> float:
    """Two units in the last place, and no less than what fp32 sums differ by."""
    return max(1e-5, 2 * torch.finfo(dtype).eps)
