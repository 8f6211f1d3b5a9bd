"""What a layer did to the residual stream, token by token.

Read by LAC (arXiv 2505.14467): the change of the norm; by saturation (CALM, arXiv 2207.07061) and
by LLM-Drop's importance (arXiv 2406.15786): the cosine.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation

NORM, CHANGE, COSINE = range(3)
"""Columns."""
SMALLEST = 1e-12
"""What the cosine divides by at least: with a row of zeros it is 0."""


def _fake(delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return delta.new_empty((len(delta), 3), dtype=torch.float32)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.layer_stats:layer_stats",
    triton="sluice.kernels.triton.layer_stats:layer_stats",
)
def layer_stats(delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Compare the stream after a layer with the stream before it; sums are taken in fp32.

    Args:
        delta: (rows, hidden), any float dtype, any strides.
        residual: (rows, hidden), any float dtype, any strides: with `delta` vLLM's pair, whose sum
            is the stream after the layer. Or (0,): `delta` is that sum.
        before: (rows, hidden), any float dtype, any strides: the stream before the layer.

    Returns:
        fp32, (rows, 3), contiguous, by `NORM` of the stream after the layer, `CHANGE` of the norm
        and `COSINE` of the two; a row with NaN has NaN in what depends on it.
    """
    after, before = delta.float(), before.float()
    if residual.numel():
        after = after + residual.float()
    length, length_before = after.norm(dim=-1), before.norm(dim=-1)
    cosine = (after * before).sum(-1) / (length * length_before).clamp_min(SMALLEST)
    return torch.stack((length, length - length_before, cosine), dim=-1)
