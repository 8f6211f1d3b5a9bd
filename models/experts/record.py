"""What experts the tokens of one request ran, summed over steps and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sluice.kernels.route_columns import ACTIVE, ROUTED
from sluice.models.depth.skip import DECODE, PHASES
from sluice.models.expert_shape import ExpertShape
from sluice.models.plan import Segment

if TYPE_CHECKING:
    from sluice.models.telemetry import ModuleCost

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class ExpertRecord:
    """Sums of a request.

    Attributes:
        neighbour_dependent: a budget made the request share experts with others.
        ran: int64, (2 phases, 3): of the tokens, each layer counted; columns as in
            `sluice.kernels.route_columns`.
        loaded: distinct experts run by a layer's rows, over the layers and steps that the request
            was in.
        layers: how many layers of steps these were.
        weak: int64, (2 phases,): token rows of a contrast's weak pass.
    """

    neighbour_dependent: bool
    ran: IntArray = field(default_factory=lambda: np.zeros((len(PHASES), 3), dtype=np.int64))
    loaded: int = 0
    layers: int = 0
    weak: IntArray = field(default_factory=lambda: np.zeros(len(PHASES), dtype=np.int64))

    def more(self, cost: ModuleCost, shape: ExpertShape) -> tuple[float, float]:
        """Multiplications beyond the model's own: of all tokens, of generated ones.

        Experts that did not run count as less; a weak pass runs a layer's rows once more, with
        one expert.
        """
        ran = (self.ran[:, ACTIVE] - self.ran[:, ROUTED] * shape.top_k) * cost.expert
        left_out = (shape.top_k - 1) * len(shape.layers) * cost.expert
        phases = ran + self.weak * (cost.modules.sum() - left_out)
        return float(phases.sum()), float(phases[DECODE])

    def to_wire(self) -> dict[str, Any]:
        """The report's part about experts; no mean where no router ran."""
        active, taken, routed = self.ran.sum(axis=0).tolist()
        wire = {
            "active_mean": active / routed if routed else None,
            "masked": taken,
            "loaded_per_step": self.loaded / self.layers if self.layers else None,
            "neighbour_dependent": self.neighbour_dependent,
        }
        return {**wire, "weak": {"tokens": int(self.weak.sum())}} if self.weak.any() else wire


def by_request(ran: IntArray, segments: Sequence[Segment], requests: int) -> IntArray:
    """What the tokens of each request ran, int64, (requests, 2 phases, 3).

    Args:
        ran: of each token, (tokens, 3), columns as above.
        segments: of the step.
        requests: in it, weak passes among them.
    """
    groups = [segment.request * len(PHASES) + segment.phase for segment in segments]
    tokens = np.repeat(groups, [segment.length for segment in segments])
    sums = np.zeros((requests * len(PHASES), ran.shape[1]), dtype=np.int64)
    np.add.at(sums, tokens, ran)
    return sums.reshape(requests, len(PHASES), -1)
