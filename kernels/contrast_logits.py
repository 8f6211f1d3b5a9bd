"""Strong and weak logits to one distribution (SCMoE, 2405.14507).

Plain PyTorch; also the CPU path.
"""

from __future__ import annotations

import torch


def contrast_logits(
    strong: torch.Tensor, weak: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """`(1 + beta) * strong - beta * weak`, -inf where the strong pass finds a token implausible.

    Args:
        strong: (rows, vocabulary), any float dtype.
        weak: (rows, vocabulary).
        beta: fp32, (rows,), >= 0.
        alpha: fp32, (rows,), in (0, 1]: least share of the strong pass's best probability.

    Returns:
        (rows, vocabulary), dtype of `strong`.
    """
    plain = strong.float()
    factor = beta.unsqueeze(-1)
    mixed = (1.0 + factor) * plain - factor * weak.float()
    least = plain.amax(-1, keepdim=True) + alpha.log().unsqueeze(-1)
    return mixed.masked_fill(plain < least, float("-inf")).to(strong.dtype)
