"""Softmax response: leave when the first token is far enough ahead of the second.

Source: CALM, "Confident Adaptive Language Modeling" (arXiv 2207.07061), measure 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.parameters import Number

if TYPE_CHECKING:
    from torch import Tensor


class Confidence(ExitMethod):
    """Top-1 minus top-2 probability at the exit is at least the threshold."""

    name = "confidence"
    description = "once one choice is well ahead"
    source = "CALM (arXiv 2207.07061)"
    parameters = {"threshold": Number(0.0, 1.0)}
    needs_logits = True
    decays = True

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        from sluice.kernels.ops.exit_decision import CONFIDENCE, exit_decision

        assert at.logits is not None
        _, leaves = exit_decision(at.logits, at.threshold, CONFIDENCE)
        return leaves
