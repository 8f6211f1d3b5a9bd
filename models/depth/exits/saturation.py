"""Hidden-state saturation: leave when a layer hardly turns the residual stream.

Source: CALM (arXiv 2207.07061), measure 2, which is the per-token form of MuE's layer similarity
(arXiv 2211.11152). Adjacent layers of pre-norm models are always similar: calibrate per model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint, row_cosine
from sluice.models.depth.parameters import Number

if TYPE_CHECKING:
    from torch import Tensor


class Saturation(ExitMethod):
    """Cosine of the residual stream before and after the layer is at least the threshold."""

    name = "saturation"
    description = "once a layer hardly changes it"
    source = "CALM (arXiv 2207.07061), MuE (arXiv 2211.11152)"
    parameters = {"threshold": Number(-1.0, 1.0)}
    needs_previous = True
    decays = True

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        assert at.previous is not None
        return row_cosine(at.hidden, at.previous) >= at.threshold
