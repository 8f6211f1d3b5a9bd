"""`contrast_logits` on a CPU; the rules are in `sluice.kernels.ops.contrast_logits`.

Few tokens of a vocabulary are plausible, so the weak pass is read, and logits are combined, for
those tokens only.
"""

from __future__ import annotations

import torch

from sluice.kernels.ops.contrast_logits import IMPLAUSIBLE


def contrast_logits(
    strong: torch.Tensor, weak: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """See `sluice.kernels.ops.contrast_logits.contrast_logits`."""
    plain = strong.float()
    best = plain.amax(-1, keepdim=True)
    implausible = plain < best + alpha.log().unsqueeze(-1)
    row, token = implausible.logical_not_().nonzero(as_tuple=True)
    factor = beta[row]
    mixed = (1.0 + factor) * plain[row, token] - factor * weak[row, token].float()
    lowest = torch.full_like(beta, float("inf")).scatter_reduce_(0, row, mixed, "amin")
    logits = (plain - best).add_((lowest - IMPLAUSIBLE).unsqueeze(-1))
    logits[row, token] = mixed
    return logits.to(strong.dtype).contiguous()
