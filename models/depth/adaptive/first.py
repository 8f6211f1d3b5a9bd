"""FiRST: trained routers choose a request's layers from its prompt.

Source: "FiRST: Finetuning Router-Selective Transformers" (arXiv 2410.12513). One router a layer
reads that layer's input. Pooling by the mean over the prompt's tokens is our reading of the
paper; the router is linear, so pooling its outputs equals pooling its inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import PromptMethod, Tensors
from sluice.models.depth.parameters import Flag, Number
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor


class First(PromptMethod):
    """A block is kept if `sigmoid(mean(w_l . h + b_l))` is at least the threshold."""

    name = "first"
    description = "trained routers choose the layers from the prompt"
    source = "FiRST (arXiv 2410.12513)"
    parameters = {
        "threshold": Number(0.0, 1.0, default=0.5),
        "masked_prefill": Flag(needs_whole_prompt=True),
    }
    pool = "mean"
    profile_tensors = ("weight", "bias")
    """(layers, hidden) and (layers,); fp32."""

    def masks_prompt(self, rule: AdaptiveRule) -> bool:
        """See `PromptMethod.masks_prompt`: a router reads its layer's input."""
        return rule.get("masked_prefill") is True

    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG002
        """Router logit of each token."""
        return before.float() @ tensors["weight"][layer] + tensors["bias"][layer]

    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """See `PromptMethod.skipped_blocks`."""
        return 1.0 / (1.0 + np.exp(-pooled)) < rule.number("threshold")
