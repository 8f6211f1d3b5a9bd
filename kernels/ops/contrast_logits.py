"""Strong and weak logits to one distribution (SCMoE, arXiv 2405.14507)."""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation

IMPLAUSIBLE = 1e4
"""How far below the plausible tokens' logits those of all others lie. No probability is left of
them, as with -inf, but a grammar that rules the plausible tokens out still meets a best one."""


def _fake(
    strong: torch.Tensor, weak: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    return strong.new_empty(strong.shape)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.contrast_logits:contrast_logits",
    triton="sluice.kernels.triton.contrast_logits:contrast_logits",
)
def contrast_logits(
    strong: torch.Tensor, weak: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """`(1 + beta) * strong - beta * weak`, with tokens the strong pass finds implausible far down.

    Computed in fp32.

    Args:
        strong: (rows, vocabulary), any float dtype, any strides; a finite number in every row.
        weak: (rows, vocabulary), any float dtype, any strides.
        beta: fp32, (rows,), >= 0.
        alpha: fp32, (rows,), in (0, 1]: least share of the strong pass's best probability.

    Returns:
        (rows, vocabulary), dtype of `strong`, contiguous.
    """
    plain = strong.float()
    factor = beta.unsqueeze(-1)
    mixed = (1.0 + factor) * plain - factor * weak.float()
    best = plain.amax(-1, keepdim=True)
    implausible = plain < best + alpha.log().unsqueeze(-1)
    lowest = mixed.masked_fill(implausible, float("inf")).amin(-1, keepdim=True)
    logits = torch.where(implausible, lowest - IMPLAUSIBLE + (plain - best), mixed)
    return logits.to(strong.dtype).contiguous()
