"""Entropy: leave when the distribution over the vocabulary is narrow enough.

Source: BranchyNet's criterion (arXiv 1709.01686), used for language models by DeeBERT
(arXiv 2004.12993); in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint, Parameter

if TYPE_CHECKING:
    from torch import Tensor


class Entropy(ExitMethod):
    """Entropy of the distribution at the exit is at most the threshold, in nats."""

    name = "entropy"
    source = "BranchyNet (arXiv 1709.01686), DeeBERT (arXiv 2004.12993)"
    parameters = {"threshold": Parameter(0.0, 20.0)}
    needs_logits = True

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        assert at.logits is not None
        log_p = at.logits.log_softmax(-1)
        # A masked-out token has p = 0 and log p = -inf; its product is 0, not NaN.
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        return entropy <= at.threshold
