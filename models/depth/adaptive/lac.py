"""LAC: layers that hardly grow the residual stream's norm are void.

Source: "Void in Language Models" (arXiv 2505.14467) and its released code. With
`D_l = |h_l| - |h_{l-1}|`, layer l is void iff `D_l < alpha * R_l`, where `R_l` is the range of D
over the *earlier* layers and `R_0 = 0`. The test needs the layer's own output, so it cannot save
that layer; the three modes differ in what they do with the answer:

* `readout` is the released code: everything runs, and the last non-void layer's output goes to
  the final norm. Keys and values are those of full depth.
* `replace` goes on from the layer's input where the layer is void. Keys and values of the layer
  are written all the same. A study of quality; it saves nothing.
* `predict` takes the void map of the last prompt token as the mask of all generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import AdaptiveMethod, PromptMethod, Tensors, TokenMethod
from sluice.models.depth.parameters import Choice, Number, Parameter
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor

_DESCRIPTION = "leaves out layers that add little to the last prompt token"
_SOURCE = "Void in Language Models (arXiv 2505.14467)"
_PARAMETERS: Mapping[str, Parameter] = {
    "mode": Choice(("readout", "replace", "predict"), default="predict"),
    "threshold": Number(0.0, 1.0, default=0.8),
}


class LAC(PromptMethod):
    """Mode `predict`; the other two are methods of another kind."""

    name = "lac"
    description = _DESCRIPTION
    source = _SOURCE
    parameters = _PARAMETERS
    pool = "last"

    def in_mode(self, rule: AdaptiveRule) -> AdaptiveMethod:
        """See `AdaptiveMethod.in_mode`."""
        match rule.get("mode"):
            case "readout":
                return _Readout()
            case "replace":
                return _Replace()
        return self

    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG002
        """Change of the norm."""
        return norm_change(before, after)

    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """See `PromptMethod.skipped_blocks`."""
        highest = np.maximum.accumulate(np.concatenate([pooled[:1], pooled[:-1]]))
        lowest = np.minimum.accumulate(np.concatenate([pooled[:1], pooled[:-1]]))
        void: NDArray[np.bool_] = pooled < rule.number("threshold") * (highest - lowest)
        return void


class _Readout(TokenMethod):
    """Mode `readout`."""

    name = LAC.name
    description = _DESCRIPTION
    source = _SOURCE
    parameters = _PARAMETERS
    replaces = False

    def void(
        self,
        layer: int,  # noqa: ARG002
        before: Tensor,
        after: Tensor,
        rule: AdaptiveRule,
        state: dict[str, Tensor],
        tensors: Tensors,  # noqa: ARG002
    ) -> Tensor:
        """See `TokenMethod.void`."""
        change = norm_change(before, after)
        if not state:
            state.update(highest=change, lowest=change)
            return change < 0.0
        highest, lowest = state["highest"], state["lowest"]
        state.update(highest=highest.maximum(change), lowest=lowest.minimum(change))
        return change < rule.number("threshold") * (highest - lowest)


class _Replace(_Readout):
    """Mode `replace`."""

    replaces = True


def norm_change(before: Tensor, after: Tensor) -> Tensor:
    """`|after| - |before|` per row, (rows, hidden) each; fp32, (rows,)."""
    from sluice.kernels.ops.layer_stats import CHANGE, layer_stats

    return layer_stats(after, after.new_empty(0), before)[:, CHANGE]
