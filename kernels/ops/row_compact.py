"""Stable compaction of token rows and the way back, for both halves of the residual stream at once.

vLLM carries a hidden state as a pair `(delta, residual)` whose sum it is; rows of both go together.
On a CPU PyTorch's own row copies are the vectorised path.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation


def _fake_compact(
    delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (index.shape[0], delta.shape[1])
    return delta.new_empty(shape), residual.new_empty(shape)


@operation(fake=_fake_compact, triton="sluice.kernels.triton.row_compact:row_compact")
def row_compact(
    delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the chosen rows of a pair, in order.

    Args:
        delta: (tokens, hidden), any dtype, any strides.
        residual: (tokens, hidden), any dtype, any strides.
        index: (rows,), int64, in [0, tokens), on the device of the pair.

    Returns:
        Their `delta` and `residual`, (rows, hidden), contiguous, never a view.
    """
    return delta.index_select(0, index), residual.index_select(0, index)


def _fake_scatter(
    delta: torch.Tensor,
    residual: torch.Tensor,
    index: torch.Tensor,
    delta_rows: torch.Tensor,
    residual_rows: torch.Tensor,
) -> None:
    return None


@operation(
    fake=_fake_scatter,
    mutates=("delta", "residual"),
    triton="sluice.kernels.triton.row_compact:row_scatter",
)
def row_scatter(
    delta: torch.Tensor,
    residual: torch.Tensor,
    index: torch.Tensor,
    delta_rows: torch.Tensor,
    residual_rows: torch.Tensor,
) -> None:
    """Write the compacted rows of a pair back in place; the inverse of `row_compact`.

    Args:
        delta: (tokens, hidden), any strides, changed in place.
        residual: (tokens, hidden), any strides, changed in place.
        index: (rows,), int64, in [0, tokens), without repeats, on the device of the pair.
        delta_rows: (rows, hidden), dtype of `delta`, any strides.
        residual_rows: (rows, hidden), dtype of `residual`, any strides.
    """
    delta.index_copy_(0, index, delta_rows)
    residual.index_copy_(0, index, residual_rows)
