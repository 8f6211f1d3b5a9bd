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

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import Parameter, PromptMethod, Tensors
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("readout", "replace", "predict")


class LAC(PromptMethod):
    """Mode `predict`, and the parameters of all three."""

    name = "lac"
    source = "Void in Language Models (arXiv 2505.14467)"
    parameters = {"threshold": Parameter(0.0, 1.0, default=0.8)}
    pool = "last"

    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG002
        """Change of the norm."""
        return norm_change(before, after)

    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """See `PromptMethod.skipped_blocks`."""
        assert rule.threshold is not None
        highest = np.maximum.accumulate(np.concatenate([pooled[:1], pooled[:-1]]))
        lowest = np.minimum.accumulate(np.concatenate([pooled[:1], pooled[:-1]]))
        void: NDArray[np.bool_] = pooled < rule.threshold * (highest - lowest)
        return void


def norm_change(before: Tensor, after: Tensor) -> Tensor:
    """`|after| - |before|` per row, (rows, hidden) each; fp32, (rows,)."""
    from sluice.kernels.ops.layer_stats import CHANGE, layer_stats

    return layer_stats(after, after.new_empty(0), before)[:, CHANGE]


class VoidRange:
    """The running range of one layer after the other, for the modes that act per token."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._highest: Tensor | None = None
        self._lowest: Tensor | None = None

    def void(self, change: Tensor) -> Tensor:
        """Whether the layer with this change, (rows,), is void: bool, (rows,)."""
        if self._highest is None or self._lowest is None:
            self._highest = self._lowest = change
            return change < 0.0
        void = change < self._alpha * (self._highest - self._lowest)
        self._highest = self._highest.maximum(change)
        self._lowest = self._lowest.minimum(change)
        return void
