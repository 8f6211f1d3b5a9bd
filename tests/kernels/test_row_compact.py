"""Compaction and its inverse, bit for bit."""

from __future__ import annotations

import pytest
import torch

from sluice.kernels.row_compact import row_compact, row_scatter

GRID = [
    pytest.param(1, [0], id="one token"),
    pytest.param(7, [], id="no rows"),
    pytest.param(7, [6], id="last row only"),
    pytest.param(7, list(range(7)), id="all rows"),
    pytest.param(13, [0, 2, 3, 5, 7, 11], id="prime sizes"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "chosen"), GRID)
def test_there_and_back(tokens: int, chosen: list[int], dtype: torch.dtype) -> None:
    state = torch.randn(tokens, 5).to(dtype)
    before = state.clone()
    index = torch.tensor(chosen, dtype=torch.int64)
    rows = row_compact(state, index)
    assert torch.equal(rows, before[chosen])
    rows += 1
    assert torch.equal(state, before), "compaction must copy"
    row_scatter(state, index, rows)
    others = [i for i in range(tokens) if i not in chosen]
    assert torch.equal(state[chosen], rows)
    assert torch.equal(state[others], before[others])
