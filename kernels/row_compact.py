"""Stable compaction of token rows and the way back.

Plain PyTorch; also the CPU path.
"""

from __future__ import annotations

import torch


def row_compact(state: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Copy the chosen rows, in order.

    Args:
        state: (tokens, hidden), any dtype.
        index: (rows,), int64, ascending, on the device of `state`.

    Returns:
        (rows, hidden), contiguous, never a view of `state`.
    """
    return state.index_select(0, index)


def row_scatter(state: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write compacted rows back in place; the inverse of `row_compact`.

    Args:
        state: (tokens, hidden), changed in place.
        index: (rows,), int64, unique, on the device of `state`.
        rows: (rows, hidden), dtype of `state`.
    """
    state.index_copy_(0, index, rows)
