"""What one request ran, summed while it runs.

Samples of one request are requests to the engine. Each has sums of its own, which are added up
before the record is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from sluice.kernels.ops.router_config import ACTIVE, ROUTED
from sluice.models.policy.axes import (
    DECODE,
    MODULES,
    OUTCOMES,
    PHASES,
    BoolArray,
    IntArray,
)
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.request_record import ExpertUse, RoutingRecord

_MAX_TOKEN_LAYERS = 16_384
"""Tokens of a request of which the layers are kept."""


@dataclass(slots=True)
class ExpertSums:
    """What the routers did for a request, summed over its steps.

    Attributes:
        neighbour_dependent: a budget made the request share experts with others.
        ran: of the tokens, over layers, int64, (2 phases, 3); columns as in
            `sluice.kernels.ops.router_config`.
        loaded: distinct experts run by a layer's rows, over the layers and steps that the request
            was in.
        layers: how many layers of steps these were.
        weak: token rows of a contrast's weak pass, int64, (2 phases,).
    """

    neighbour_dependent: bool
    ran: IntArray = field(default_factory=lambda: np.zeros((len(PHASES), 3), dtype=np.int64))
    loaded: int = 0
    layers: int = 0
    weak: IntArray = field(default_factory=lambda: np.zeros(len(PHASES), dtype=np.int64))

    def add(self, other: ExpertSums) -> None:
        """Add what the routers did in a step, or for another sample of the request."""
        self.neighbour_dependent |= other.neighbour_dependent
        self.ran = self.ran + other.ran
        self.loaded += other.loaded
        self.layers += other.layers
        self.weak = self.weak + other.weak

    def to_wire(self) -> dict[str, Any]:
        """As what msgpack carries."""
        return {
            "neighbour_dependent": self.neighbour_dependent,
            "ran": self.ran.tolist(),
            "loaded": self.loaded,
            "layers": self.layers,
            "weak": self.weak.tolist(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        arrays = {name: np.array(wire[name], dtype=np.int64) for name in ("ran", "weak")}
        return cls(**{**wire, **arrays})

    def more(self, cost: ModuleCost, shape: ExpertShape) -> tuple[float, float]:
        """Multiplications beyond the model's own: of all tokens, of generated ones.

        Experts that did not run count as less; a weak pass runs a layer's rows once more, with
        one expert.
        """
        ran = (self.ran[:, ACTIVE] - self.ran[:, ROUTED] * shape.top_k) * cost.expert
        not_run = (shape.top_k - 1) * len(shape.layers) * cost.expert
        phases = ran + self.weak * (cost.modules.sum() - not_run)
        return float(phases.sum()), float(phases[DECODE])

    def use(self) -> ExpertUse:
        """The record's part about experts."""
        active, masked, routed = self.ran.sum(axis=0).tolist()
        return ExpertUse(
            active_mean=active / routed if routed else None,
            masked=masked,
            loaded_per_step=self.loaded / self.layers if self.layers else None,
            neighbour_dependent=self.neighbour_dependent,
            weak_tokens=int(self.weak.sum()),
        )


@dataclass(slots=True)
class RequestSums:
    """What the tokens of a request have run so far.

    Attributes:
        counts: as in `RoutingRecord`.
        exits: as in `RoutingRecord`.
        heads: rows that a token was sampled from, and rows that the LM head ran on, int64,
            (2 phases, 2).
        exit_layers: as in `RoutingRecord`.
        token_layers: as in `RoutingRecord`.
        skipped: the mask a prompt method decided on, bool, (layers, 2 modules), or None.
        experts: what the routers did, or None without expert controls.
        samples: how many were added up.
    """

    counts: IntArray
    exits: IntArray
    heads: IntArray = field(default_factory=lambda: np.zeros((len(PHASES), 2), dtype=np.int64))
    exit_layers: list[int] = field(default_factory=list)
    token_layers: list[int] = field(default_factory=list)
    skipped: BoolArray | None = None
    experts: ExpertSums | None = None
    samples: int = 1

    @classmethod
    def zeros(cls, num_layers: int) -> Self:
        """Of a request that has run nothing."""
        shape = (len(PHASES), num_layers, len(MODULES), len(OUTCOMES))
        return cls(np.zeros(shape, dtype=np.int64), np.zeros(num_layers, dtype=np.int64))

    def add_token(self, index: int, layer: int) -> None:
        """Note the last layer that ran for a token of the answer.

        A token that is computed again after a preemption is noted already, and so ignored.

        Args:
            index: of the token in the answer, from 0.
            layer: 0-based.
        """
        if index == len(self.token_layers) < _MAX_TOKEN_LAYERS:
            self.token_layers.append(layer)

    def add_experts(self, experts: ExpertSums) -> None:
        """Add what the routers did."""
        if self.experts is None:
            self.experts = ExpertSums(experts.neighbour_dependent)
        self.experts.add(experts)

    def add(self, other: RequestSums) -> None:
        """Add another sample of the same request."""
        self.counts = self.counts + other.counts
        self.exits = self.exits + other.exits
        self.heads = self.heads + other.heads
        self.exit_layers = self.exit_layers + other.exit_layers
        self.token_layers = self.token_layers + other.token_layers
        self.skipped = other.skipped if self.skipped is None else self.skipped
        if other.experts is not None:
            self.add_experts(other.experts)
        self.samples += other.samples

    def to_wire(self) -> dict[str, Any]:
        """As what msgpack carries."""
        return {
            "counts": self.counts.tobytes(),
            "exits": self.exits.tobytes(),
            "heads": self.heads.tolist(),
            "exit_layers": self.exit_layers,
            "token_layers": self.token_layers,
            "skipped": None if self.skipped is None else self.skipped.tobytes(),
            "experts": self.experts and self.experts.to_wire(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        exits = np.frombuffer(wire["exits"], dtype=np.int64)
        counts = np.frombuffer(wire["counts"], dtype=np.int64)
        skipped, experts = wire["skipped"], wire["experts"]
        return cls(
            counts=counts.reshape(len(PHASES), len(exits), len(MODULES), len(OUTCOMES)),
            exits=exits,
            heads=np.array(wire["heads"], dtype=np.int64),
            exit_layers=wire["exit_layers"],
            token_layers=wire["token_layers"],
            skipped=None
            if skipped is None
            else np.frombuffer(skipped, dtype=np.bool_).reshape(len(exits), len(MODULES)),
            experts=None if experts is None else ExpertSums.from_wire(experts),
        )

    def record(self, cost: ModuleCost, shape: ExpertShape | None) -> RoutingRecord:
        """The record of the request, now that it has ended.

        Args:
            cost: of the model.
            shape: of its routed experts, if it has any.
        """
        more, more_generated = 0.0, 0.0
        if self.experts is not None and shape is not None:
            more, more_generated = self.experts.more(cost, shape)
        mask = None
        if self.skipped is not None:
            layers = (np.flatnonzero(self.skipped[:, column]) for column in range(len(MODULES)))
            mask = {name: left.tolist() for name, left in zip(MODULES, layers, strict=True)}
        return RoutingRecord(
            counts=self.counts,
            exits=self.exits,
            compute_fraction=cost.fraction(self.counts.sum(axis=0), self.heads.sum(axis=0), more),
            generated_compute_fraction=cost.fraction(
                self.counts[DECODE], self.heads[DECODE], more_generated
            ),
            exit_layers=tuple(self.exit_layers),
            token_layers=tuple(self.token_layers) if self.samples == 1 else (),
            mask=mask,
            experts=None if self.experts is None else self.experts.use(),
        )
