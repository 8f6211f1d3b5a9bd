"""Whether tokens leave by what the LM head makes of them at an exit.

Sources: CALM (arXiv 2207.07061), the softmax response; BranchyNet (arXiv 1709.01686), the entropy.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation

CONFIDENCE, ENTROPY = range(2)
"""Measures: top-1 minus top-2 probability is at least the threshold; the entropy is at most it."""
FIRST, SECOND, LOG_SUM, SPREAD = range(4)
"""Columns: largest logit and second largest, log-sum-exp, entropy."""
NOTHING = -1e4
"""A logit that far below the largest, or further, counts as this far: its exponential is 0, and 0
times this is 0 too."""
_OUT = float("-inf")
_BROKEN = float("nan")


def _fake(
    logits: torch.Tensor, threshold: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(logits)
    stats = logits.new_empty((rows, 4), dtype=torch.float32)
    return stats, stats.new_empty(rows, dtype=torch.bool)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.exit_decision:exit_decision",
    triton="sluice.kernels.triton.exit_decision:exit_decision",
)
def exit_decision(
    logits: torch.Tensor, threshold: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the distribution of each row and hold it against the row's threshold, in fp32.

    A logit of -inf is a token without probability. A row of nothing else has no distribution: its
    entropy is NaN. A row with NaN or inf is NaN throughout. Neither leaves.

    Args:
        logits: (rows, vocabulary), any float dtype, any strides.
        threshold: fp32, (rows,).
        measure: `CONFIDENCE` or `ENTROPY`.

    Returns:
        fp32, (rows, 4), contiguous, by `FIRST`, `SECOND`, `LOG_SUM` and `SPREAD`, in nats; the
        second largest of equals is the largest, that of a vocabulary of one is -inf. And bool,
        (rows,): who leaves.
    """
    values = logits.float()
    first, second = _best_two(values)
    below = values - first.masked_fill(first == _OUT, 0.0).unsqueeze(-1)
    below = below.clamp_min(NOTHING)
    raised = below.exp()
    total = raised.sum(-1)
    spread = total.log()
    entropy = spread - (raised * below).sum(-1) / total
    if measure == CONFIDENCE:
        leaves = (1.0 - (second - first).exp()) / total >= threshold
    else:
        leaves = entropy <= threshold
    stats = torch.stack((first, second, first + spread, entropy), dim=-1)
    return stats.masked_fill(total.isnan().unsqueeze(-1), _BROKEN), leaves


def _best_two(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if values.shape[1] == 1:
        only = values[:, 0]
        return only, torch.full_like(only, _OUT)
    first, second = values.topk(2, dim=-1).values.unbind(-1)
    return first, second
