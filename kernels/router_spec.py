"""How a model's own router selects."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router before any control.

    Attributes:
        top_k: experts per token.
        scoring: `softmax` or `sigmoid`.
        renormalize: selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups, 1 for none; group-limited selection as in DeepSeek-V2 and -V3.
        topk_group: groups that a row may choose from.
        correction: fp32, (experts,), added to selection scores only, or None.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1
    correction: torch.Tensor | None = None

    @property
    def numbers(self) -> tuple[int, bool, bool, float, int, int]:
        """As `route_topk` takes them: `top_k` to `topk_group`."""
        rest = (self.renormalize, self.scale, self.groups, self.topk_group)
        return (self.top_k, self.sigmoid, *rest)

    @property
    def score_numbers(self) -> tuple[bool, int, int]:
        """As `router_scores` takes them: `sigmoid` to `topk_group`."""
        return (self.sigmoid, self.groups, self.topk_group)

    @property
    def sigmoid(self) -> bool:
        """Whether scores are the sigmoid of the logits instead of their softmax."""
        return self.scoring == "sigmoid"

    @property
    def corrections(self) -> torch.Tensor:
        """`correction`, or an empty tensor."""
        return torch.empty(0) if self.correction is None else self.correction
