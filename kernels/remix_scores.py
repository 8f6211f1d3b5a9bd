"""Router probabilities pulled towards a reference pathway (C3PO, 2504.07964).

Plain PyTorch; also the CPU path.
"""

from __future__ import annotations

import torch


def remix_scores(
    scores: torch.Tensor, reference: torch.Tensor, alpha: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """`alpha * scores + (1 - alpha) * reference` over each row's best experts, mass kept.

    Args:
        scores: fp32, (rows, experts), >= 0.
        reference: fp32, (rows, experts), >= 0, any mass; a row without mass among the experts
            that take part stays as it is.
        alpha: fp32, (rows,), in [0, 1].
        top: int64, (rows,): how many of the row's best experts take part.

    Returns:
        fp32, (rows, experts).
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(ranked)
    inside = torch.zeros_like(scores, dtype=torch.bool)
    inside.scatter_(1, ranked, places < top.unsqueeze(-1))
    mass = scores.masked_fill(~inside, 0.0).sum(-1, keepdim=True)
    pulled = reference.masked_fill(~inside, 0.0)
    weight = pulled.sum(-1, keepdim=True)
    # In this order: the reference may weigh so little that its inverse has no fp32.
    pulled = pulled / weight * mass
    share = alpha.unsqueeze(-1)
    return torch.where(inside & (weight > 0), share * scores + (1 - share) * pulled, scores)
