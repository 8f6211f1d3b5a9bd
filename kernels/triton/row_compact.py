"""`row_compact` and `row_scatter` in Triton; arguments are in `sluice.kernels.ops.row_compact`."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_BLOCK = 2048
"""Numbers of each half that a program copies: rows times padded columns."""
_WIDTH = 1024
"""Columns that a program copies at most."""


@triton.jit
def _copy(
    delta: tl.tensor,
    residual: tl.tensor,
    index: tl.tensor,
    delta_rows: tl.tensor,
    residual_rows: tl.tensor,
    rows: int,
    hidden: int,
    delta_stride: tl.tensor,
    delta_step: tl.tensor,
    residual_stride: tl.tensor,
    residual_step: tl.tensor,
    delta_rows_stride: tl.tensor,
    delta_rows_step: tl.tensor,
    residual_rows_stride: tl.tensor,
    residual_rows_step: tl.tensor,
    BACK: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
) -> None:
    """Rows of the pair at `index` to the compacted pair, or with `BACK` the other way."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1).to(tl.int64) * H + tl.arange(0, H)
    valid = row < rows
    inside = valid[:, None] & (column < hidden)[None, :]
    source = tl.load(index + row, mask=valid, other=0)
    delta_at = delta + source[:, None] * delta_stride + column[None, :] * delta_step
    residual_at = residual + source[:, None] * residual_stride + column[None, :] * residual_step
    packed_delta = delta_rows + row[:, None] * delta_rows_stride
    packed_delta += column[None, :] * delta_rows_step
    packed_residual = residual_rows + row[:, None] * residual_rows_stride
    packed_residual += column[None, :] * residual_rows_step
    if BACK:
        deltas = tl.load(packed_delta, mask=inside)
        residuals = tl.load(packed_residual, mask=inside)
        tl.store(delta_at, deltas, mask=inside)
        tl.store(residual_at, residuals, mask=inside)
    else:
        deltas = tl.load(delta_at, mask=inside)
        residuals = tl.load(residual_at, mask=inside)
        tl.store(packed_delta, deltas, mask=inside)
        tl.store(packed_residual, residuals, mask=inside)


def _launch(
    delta: torch.Tensor,
    residual: torch.Tensor,
    index: torch.Tensor,
    delta_rows: torch.Tensor,
    residual_rows: torch.Tensor,
    *,
    back: bool,
) -> None:
    rows, hidden = delta_rows.shape
    if not delta_rows.numel():
        return
    width = min(_WIDTH, triton.next_power_of_2(hidden))
    per_program = min(triton.next_power_of_2(rows), _BLOCK // width)
    _copy[(triton.cdiv(rows, per_program), triton.cdiv(hidden, width))](
        delta,
        residual,
        index,
        delta_rows,
        residual_rows,
        rows,
        hidden,
        *delta.stride(),
        *residual.stride(),
        *delta_rows.stride(),
        *residual_rows.stride(),
        BACK=back,
        R=per_program,
        H=width,
    )


def row_compact(
    delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.row_compact.row_compact`."""
    shape = (len(index), delta.shape[1])
    delta_rows, residual_rows = delta.new_empty(shape), residual.new_empty(shape)
    _launch(delta, residual, index, delta_rows, residual_rows, back=False)
    return delta_rows, residual_rows


def row_scatter(
    delta: torch.Tensor,
    residual: torch.Tensor,
    index: torch.Tensor,
    delta_rows: torch.Tensor,
    residual_rows: torch.Tensor,
) -> None:
    """See `sluice.kernels.ops.row_compact.row_scatter`."""
    _launch(delta, residual, index, delta_rows, residual_rows, back=True)
