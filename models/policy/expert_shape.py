"""The routed experts of a loaded model, as its routers say; what a policy is checked against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from sluice.kernels.ops.router_config import RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape(RouterConfig):
    """What all mixture-of-experts layers of a model have in common, and which layers these are.

    Attributes:
        layers: decoder layers that have routed experts, ascending; the others are dense.
        experts: routed experts per layer.
        corrected: a learned correction bias is added to selection scores; a group's score is then
            the sum of its two best instead of its best.
    """

    layers: tuple[int, ...]
    experts: int
    corrected: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, wire: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**wire, "layers": tuple(wire["layers"])})
