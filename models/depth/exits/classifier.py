"""A linear classifier of whether the token at hand is settled.

Source: CALM (arXiv 2207.07061), measure 3: trained after the fact, with the model frozen, to
predict that the exit's answer equals the last layer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.parameters import Number

if TYPE_CHECKING:
    from torch import Tensor


class Classifier(ExitMethod):
    """`sigmoid(w . h + b)` at the exit is at least the threshold."""

    name = "classifier"
    description = "once its trained head is sure"
    source = "CALM (arXiv 2207.07061)"
    parameters = {"threshold": Number(0.0, 1.0)}
    decays = True
    profile_tensors = ("weight", "bias")
    """(hidden,) and (); fp32."""

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        score = (at.hidden.float() @ at.tensors["weight"] + at.tensors["bias"]).sigmoid()
        return score >= at.threshold
