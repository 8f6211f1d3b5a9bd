"""How a model's routers select, and the columns in which selections are counted: plain numbers.

Imports nothing, as the server's front end reads it without PyTorch; the correction that a layer may
have beside is in `sluice.kernels.ops.routing_args.RouterSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass

EXTRA = 2
ROWS, MASKED = -2, -1
"""Columns of a histogram after the experts': rows routed, selections that a policy took away."""

ACTIVE, TAKEN, ROUTED = range(3)
"""Columns of `SelectionCounts.by_token`: experts, selections that the policy took away, layers."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """A router before any control.

    Attributes:
        top_k: experts per token.
        scoring: `softmax` or `sigmoid`, what makes scores of router logits.
        renormalize: the selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups, 1 for none; group-limited selection as in DeepSeek-V2 and -V3.
        topk_group: groups that a token may choose from.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1

    @property
    def sigmoid(self) -> bool:
        """Whether scores are the sigmoid of the logits instead of their softmax."""
        return self.scoring == "sigmoid"
