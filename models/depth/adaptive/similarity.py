"""Prompt-level similarity: leave out the blocks that hardly turned this prompt's hidden states.

Source: LLM-Drop's block metric (arXiv 2406.15786), taken on the request's own prompt instead of a
calibration set. Training-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import Parameter, PromptMethod, Tensors, row_cosine
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor


class Similarity(PromptMethod):
    """Either every block whose mean cosine reaches the threshold, or the most similar ones.

    With `budget`, `floor(layers * (1 - budget) + 1/2)` blocks are left out; of equal ones the
    deeper first.
    """

    name = "similarity"
    source = "after LLM-Drop (arXiv 2406.15786)"
    parameters = {"threshold": Parameter(-1.0, 1.0), "budget": Parameter(0.0, 1.0)}
    pool = "mean"

    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG002
        """Cosine of each token's residual stream before and after the block."""
        return row_cosine(before, after)

    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """See `PromptMethod.skipped_blocks`."""
        if rule.threshold is not None:
            return pooled >= rule.threshold
        assert rule.budget is not None
        layers = len(pooled)
        count = int(np.floor(layers * (1.0 - rule.budget) + 0.5))
        skipped = np.zeros(layers, dtype=np.bool_)
        skipped[np.lexsort((np.arange(layers), pooled))[layers - count :]] = True
        return skipped
