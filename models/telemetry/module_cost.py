"""What the parts of a model cost a token: the unit of `compute_fraction`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from sluice.models.policy.axes import ATTENTION, EXECUTED, FILLED, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Parameters a token multiplies with, per layer; the unit of `compute_fraction`.

    Attributes:
        modules: float64, shape (layers, 2 modules).
        fill: float64, shape (layers,): what filling K/V costs instead of attention.
        expert: one routed expert; 0 for a dense model.
        head: the LM head.
    """

    modules: FloatArray
    fill: FloatArray
    expert: float = 0.0
    head: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "modules": self.modules.tolist(),
            "fill": self.fill.tolist(),
            "expert": self.expert,
            "head": self.head,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        return cls(np.array(wire["modules"]), np.array(wire["fill"]), wire["expert"], wire["head"])

    def worth_of_leaving(self) -> FloatArray:
        """What a token saves that leaves after a layer and fills the K/V above; in LM heads.

        Returns:
            (layers,).
        """
        own = self.modules.sum(axis=1) - self.fill
        above: FloatArray = own[::-1].cumsum()[::-1] - own
        return above / self.head

    def fraction(self, counts: IntArray, heads: IntArray, more: float = 0.0) -> float:
        """Share of full depth's parameter multiplications that ran; 1.0 for no tokens.

        Args:
            counts: shape (layers, 2 modules, 3 outcomes).
            heads: rows that a token was sampled from, and rows that the LM head ran on, exit tests
                included; shape (2,).
            more: multiplications beyond those of the counted rows with all their experts; less
                than 0 where experts did not run.
        """
        # Layer 0 names every row once: a pending row that runs on later counts again above it.
        rows = int(counts[0, ATTENTION].sum())
        sampled, tested = heads.tolist()
        full = rows * float(self.modules.sum()) + sampled * self.head
        ran = tested * self.head + float((counts[..., EXECUTED] * self.modules).sum())
        ran += float((counts[:, ATTENTION, FILLED] * self.fill).sum())
        ran += more
        return ran / full if full else 1.0
