"""What experts the tokens of one request ran, summed over steps and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip import DECODE, PHASES
from sluice.models.plan import Segment

ACTIVE, TAKEN, ROUTED = range(3)
"""Columns of `ran`: experts run, selections that the policy took away, routings."""

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class ExpertRecord:
    """Sums of a request.

    Attributes:
        neighbour_dependent: a budget made the request share experts with others.
        ran: int64, (2 phases, 3): of the tokens, each layer counted; see `ACTIVE`.
        loaded: distinct experts run by a layer's rows, over the layers and steps that the request
            was in.
        layers: how many layers of steps these were.
        weak_tokens: token rows of a contrast's weak pass.
    """

    neighbour_dependent: bool
    ran: IntArray = field(default_factory=lambda: np.zeros((len(PHASES), 3), dtype=np.int64))
    loaded: int = 0
    layers: int = 0
    weak_tokens: int = 0

    def saved(self, top_k: int) -> tuple[int, int]:
        """Expert runs less than the model's own `top_k`: of all tokens, of generated ones."""
        saved = self.ran[:, ROUTED] * top_k - self.ran[:, ACTIVE]
        return int(saved.sum()), int(saved[DECODE])

    def to_wire(self) -> dict[str, Any]:
        """The report's part about experts; no mean where no router ran."""
        active, taken, routed = self.ran.sum(axis=0).tolist()
        wire = {
            "active_mean": active / routed if routed else None,
            "masked": taken,
            "loaded_per_step": self.loaded / self.layers if self.layers else None,
            "neighbour_dependent": self.neighbour_dependent,
        }
        return {**wire, "weak": {"tokens": self.weak_tokens}} if self.weak_tokens else wire


def by_request(ran: IntArray, segments: Sequence[Segment], requests: int) -> IntArray:
    """What the tokens of each request ran, int64, (requests, 2 phases, 3).

    Args:
        ran: of each token, (tokens, 3); see `ACTIVE`.
        segments: of the step.
        requests: in it, weak passes among them.
    """
    groups = [segment.request * len(PHASES) + segment.phase for segment in segments]
    tokens = np.repeat(groups, [segment.length for segment in segments])
    sums = np.zeros((requests * len(PHASES), ran.shape[1]), dtype=np.int64)
    np.add.at(sums, tokens, ran)
    return sums.reshape(requests, len(PHASES), -1)
