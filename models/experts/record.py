"""What experts the tokens of one request ran, summed over steps and layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sluice.models.depth.skip import DECODE, PHASES

ACTIVE, TAKEN, ROUTED = range(3)
"""Columns of `ran`: experts run, selections that the policy took away, routings."""


@dataclass(slots=True)
class ExpertRecord:
    """Sums stay on the model's device until the request has ended.

    Attributes:
        neighbour_dependent: a budget made the request share experts with others.
        ran: int64, (2 phases, 3): of the tokens, each layer counted; see `ACTIVE`.
        loaded: int64, (2,): distinct experts run by a layer's rows in the steps that the request
            was in, and layers.
        weak_tokens: token rows of a contrast's weak pass.
    """

    neighbour_dependent: bool
    ran: torch.Tensor = field(default_factory=lambda: torch.zeros(len(PHASES), 3).long())
    loaded: torch.Tensor = field(default_factory=lambda: torch.zeros(2).long())
    weak_tokens: int = 0

    def add(self, ran: torch.Tensor, loaded: torch.Tensor) -> None:
        """Add a step; shapes as in the attributes."""
        self.ran = self.ran.to(ran.device) + ran
        self.loaded = self.loaded.to(loaded.device) + loaded

    def saved(self, top_k: int) -> tuple[int, int]:
        """Expert runs less than the model's own `top_k`: of all tokens, of generated ones."""
        saved = (self.ran[:, ROUTED] * top_k - self.ran[:, ACTIVE]).tolist()
        return sum(saved), saved[DECODE]

    def to_wire(self) -> dict[str, Any]:
        """The report's part about experts; no mean where no router ran."""
        active, taken, routed = self.ran.sum(0).tolist()
        loaded, layers = self.loaded.tolist()
        wire = {
            "active_mean": active / routed if routed else None,
            "masked": taken,
            "loaded_per_step": loaded / layers if layers else None,
            "neighbour_dependent": self.neighbour_dependent,
        }
        return {**wire, "weak": {"tokens": self.weak_tokens}} if self.weak_tokens else wire
