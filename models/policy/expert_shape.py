"""The routed experts of a loaded model, as its routers say; what a policy is checked against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What all mixture-of-experts layers of a model have in common.

    Attributes:
        layers: decoder layers that have routed experts, ascending; the others are dense.
        experts: routed experts per layer.
        top_k: experts per token.
        scoring: `softmax` or `sigmoid`, what makes scores of router logits.
        renormalize: the selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups; 1 where selection is not limited by group.
        topk_group: groups that a token may choose from.
        corrected: a learned correction bias is added to selection scores; a group's score is then
            the sum of its two best instead of its best.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1
    corrected: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, wire: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**wire, "layers": tuple(wire["layers"])})
