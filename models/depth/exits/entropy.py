"""Entropy: leave when the distribution over the vocabulary is narrow enough.

Source: BranchyNet's criterion (arXiv 1709.01686), used for language models by DeeBERT
(arXiv 2004.12993); in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.parameters import Number

if TYPE_CHECKING:
    from torch import Tensor


class Entropy(ExitMethod):
    """Entropy of the distribution at the exit is at most the threshold, in nats."""

    name = "entropy"
    description = "once few choices are left"
    source = "BranchyNet (arXiv 1709.01686), DeeBERT (arXiv 2004.12993)"
    parameters = {"threshold": Number(0.0, 20.0)}
    needs_logits = True
    leaves_below = True

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        from sluice.kernels.ops.exit_decision import ENTROPY, exit_decision

        assert at.logits is not None
        _, leaves = exit_decision(at.logits, at.threshold, ENTROPY)
        return leaves
