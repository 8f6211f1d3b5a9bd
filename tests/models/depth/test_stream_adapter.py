"""Adapters of the residual stream: what they add, and what their tensors are called."""

from __future__ import annotations

import pytest
import torch

from sluice.models.depth.stream_adapter import StreamAdapter, adapters_of, tensors_of


def test_it_adds_a_low_rank_map_of_the_state_at_one_size() -> None:
    adapter = StreamAdapter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2))
    # The root mean square of (3, 4) is sqrt(12.5), and of (30, 40) ten times that.
    small, large = adapter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    size = 12.5**0.5
    assert small.tolist() == pytest.approx([3 + 3 / size, 4 + 8 / size], rel=1e-5)
    assert large.tolist() == pytest.approx([30 + 3 / size, 40 + 8 / size], rel=1e-5)


def test_the_state_keeps_its_dtype_and_shape() -> None:
    adapter = StreamAdapter(torch.zeros(1, 4), torch.zeros(4, 1))
    states = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    given = adapter(states)
    assert given.dtype is torch.bfloat16
    assert torch.equal(given, states)


def test_a_state_of_zeros_stays() -> None:
    adapter = StreamAdapter(torch.ones(1, 4), torch.ones(4, 1))
    assert adapter(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_tensors_go_through_a_profile() -> None:
    adapters = {
        layer: StreamAdapter(torch.ones(1, 2), torch.full((2, 1), layer)) for layer in (1, 3)
    }
    tensors = tensors_of("without-2", adapters)
    assert sorted(tensors) == [
        "adapter.without-2.1.down",
        "adapter.without-2.1.up",
        "adapter.without-2.3.down",
        "adapter.without-2.3.up",
    ]
    assert adapters_of("without-2", (1, 3), tensors) == adapters
    with pytest.raises(KeyError):
        adapters_of("without-2", (2,), tensors)
