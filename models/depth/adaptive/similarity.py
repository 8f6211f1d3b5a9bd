"""Prompt-level similarity: leave out the blocks that hardly turned this prompt's hidden states.

Source: LLM-Drop's block metric (arXiv 2406.15786), taken on the request's own prompt instead of a
calibration set. Training-free.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import ParameterError, PromptMethod, Tensors, row_cosine
from sluice.models.depth.parameters import Number
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor


class Similarity(PromptMethod):
    """Either every block whose mean cosine reaches the threshold, or the most similar ones.

    With `budget`, `floor(layers * (1 - budget) + 1/2)` blocks are left out; of equal ones the
    deeper first.
    """

    name = "similarity"
    description = "leaves out the layers that change the prompt least"
    source = "after LLM-Drop (arXiv 2406.15786)"
    parameters = {
        "threshold": Number(-1.0, 1.0, optional=True),
        "budget": Number(0.0, 1.0, optional=True),
    }
    pool = "mean"

    def check(self, rule: AdaptiveRule, num_layers: int) -> None:
        """Either the threshold or the budget, and a budget that leaves out some blocks, not all."""
        given = [name for name in self.parameters if rule.get(name) is not None]
        if len(given) != 1:
            count = "both" if given else "neither"
            raise ParameterError(
                "budget" if given else "threshold",
                f"method {self.name!r} takes either threshold or budget, and {count} came",
            )
        if given == ["threshold"]:
            return
        budget = rule.number("budget")
        skipped = _skipped(budget, num_layers)
        if skipped == 0:
            raise ParameterError(
                "budget", f"budget {budget:g} leaves out none of {num_layers} blocks"
            )
        if skipped == num_layers:
            raise ParameterError(
                "budget",
                f"budget {budget:g} leaves nothing to run: it keeps none of {num_layers} blocks",
                leaves_nothing=True,
            )

    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:  # noqa: ARG002
        """Cosine of each token's residual stream before and after the block."""
        return row_cosine(before, after)

    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """See `PromptMethod.skipped_blocks`."""
        if rule.get("threshold") is not None:
            return pooled >= rule.number("threshold")
        layers = len(pooled)
        count = _skipped(rule.number("budget"), layers)
        skipped = np.zeros(layers, dtype=np.bool_)
        skipped[np.lexsort((np.arange(layers), pooled))[layers - count :]] = True
        return skipped


def _skipped(budget: float, num_layers: int) -> int:
    return math.floor(num_layers * (1.0 - budget) + 0.5)
