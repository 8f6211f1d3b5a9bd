"""The operations of exit methods, run once before anybody waits for them."""

from __future__ import annotations

import torch

from sluice.kernels.exit_test import CONFIDENCE, exit_test
from sluice.kernels.layer_stats import layer_stats


def warm_up(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Test one row, so that the operations are compiled for a model.

    Args:
        hidden: size of its residual stream.
        dtype: of its states and logits.
        device: where it runs.
    """
    row = torch.zeros((1, hidden), dtype=dtype, device=device)
    layer_stats(row, row.new_empty(0), row)
    exit_test(row, torch.zeros(1, device=device), CONFIDENCE)
