"""What experts the tokens of one request ran, summed over steps and layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.kernels.ops.routing_args import ACTIVE, ROUTED
from sluice.models.depth.masks import Segment
from sluice.models.policy.axes import (
    ATTENTION,
    DECODE,
    EXECUTED,
    FILLED,
    MODULES,
    OUTCOMES,
    PHASES,
    IntArray,
)
from sluice.models.policy.expert_shape import ExpertShape

_MAX_RECORDS = 16_384


@dataclass(frozen=True, slots=True)
class ModuleCost:
    """Parameters a token multiplies with, per layer; the unit of `compute_fraction`.

    Attributes:
        modules: float64, shape (layers, 2 modules).
        fill: float64, shape (layers,): what filling K/V costs instead of attention.
        expert: one routed expert; 0 for a dense model.
    """

    modules: NDArray[np.float64]
    fill: NDArray[np.float64]
    expert: float = 0.0

    def fraction(self, counts: IntArray, more: float = 0.0) -> float:
        """Share of full depth's parameter multiplications that ran; 1.0 for no tokens.

        Args:
            counts: shape (layers, 2 modules, 3 outcomes).
            more: multiplications beyond those of the counted rows with all their experts; less
                than 0 where experts did not run.
        """
        # Layer 0 names every row once: a pending row that runs on later counts again above it.
        rows = int(counts[0, ATTENTION].sum())
        full = rows * float(self.modules.sum())
        ran = float((counts[..., EXECUTED] * self.modules).sum())
        ran += float((counts[:, ATTENTION, FILLED] * self.fill).sum())
        ran += more
        return ran / full if full else 1.0


@dataclass(slots=True)
class RequestRecord:
    """What the tokens of one request ran; samples of one request share a record.

    Attributes:
        counts: int64, (2 phases, layers, 2 modules, 3 outcomes), token rows.
        exits: int64, (layers,), generated rows by the last layer they ran.
        exit_layers: layer after which each generated token under an exit rule left, in the order
            in which they ran.
        skipped: bool, (layers, 2 modules), the mask a prompt method decided on, or None.
        experts: what experts it ran, or None without expert controls.
    """

    counts: IntArray
    exits: IntArray
    exit_layers: list[int] = field(default_factory=list)
    skipped: NDArray[np.bool_] | None = None
    experts: ExpertRecord | None = None


class RequestRecords:
    """Records of live and just-ended requests by record key."""

    def __init__(self, num_layers: int) -> None:
        self._shape = (len(PHASES), num_layers, len(MODULES), len(OUTCOMES))
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def of(self, key: str) -> RequestRecord:
        """The record of a live request, made on first use."""
        record = self._records.get(key)
        if record is None:
            # A client that vanished between its last token and the take leaves a record behind.
            while len(self._records) >= _MAX_RECORDS:
                self._records.popitem(last=False)
            record = self._records[key] = RequestRecord(
                np.zeros(self._shape, dtype=np.int64), np.zeros(self._shape[1], dtype=np.int64)
            )
        return record

    def take(self, key: str) -> RequestRecord | None:
        """Hand a record out and forget it; None if the request never reached a step."""
        return self._records.pop(key, None)


@dataclass(slots=True)
class ExpertRecord:
    """Sums of a request.

    Attributes:
        neighbour_dependent: a budget made the request share experts with others.
        ran: int64, (2 phases, 3): of the tokens, each layer counted; columns as in
            `sluice.kernels.ops.routing_args`.
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
