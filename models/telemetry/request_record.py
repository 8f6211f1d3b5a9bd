"""What one request ran: sums while it runs, and the record that its report is made of.

The worker adds every step to a request's `RequestSums`. Once the request has ended, they become a
`RoutingRecord`, which the HTTP server takes by the request's key, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from sluice.kernels.ops.router_config import ACTIVE, ROUTED
from sluice.models.policy.axes import (
    ATTENTION,
    DECODE,
    EXECUTED,
    FILLED,
    MODULES,
    OUTCOMES,
    PHASES,
    BoolArray,
    FloatArray,
    IntArray,
)
from sluice.models.policy.expert_shape import ExpertShape

_MAX_RECORDS = 16_384
_MAX_TOKEN_LAYERS = 16_384
"""Tokens of a request of which the layers are kept."""


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """What experts the tokens of a request ran.

    Attributes:
        active_mean: experts of a token and layer; None where no router ran.
        masked: selections that the policy took away.
        loaded_per_step: distinct experts that a layer loaded in a step of the request; None where
            no router ran.
        neighbour_dependent: a budget made the request share experts with others.
        weak_tokens: token rows of a contrast's weak pass.
    """

    active_mean: float | None
    masked: int
    loaded_per_step: float | None
    neighbour_dependent: bool
    weak_tokens: int = 0

    def to_wire(self) -> dict[str, Any]:
        """The report's `experts`; `weak` only where a weak pass ran."""
        wire: dict[str, Any] = {
            "active_mean": self.active_mean,
            "masked": self.masked,
            "loaded_per_step": self.loaded_per_step,
            "neighbour_dependent": self.neighbour_dependent,
        }
        return {**wire, "weak": {"tokens": self.weak_tokens}} if self.weak_tokens else wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        numbers = {name: value for name, value in wire.items() if name != "weak"}
        return cls(**numbers, weak_tokens=wire.get("weak", {}).get("tokens", 0))


@dataclass(frozen=True, slots=True, eq=False)
class RoutingRecord:
    """What an ended request ran; samples of one request share a record.

    Attributes:
        counts: token rows, int64, (2 phases, layers, 2 modules, 3 outcomes).
        exits: generated rows by the last layer that they ran anything in, int64, (layers,).
        compute_fraction: share of full depth's compute on all tokens.
        generated_compute_fraction: the same on generated tokens.
        exit_layers: layer after which each generated token under an exit rule left, in the order
            in which they ran.
        token_layers: last layer that ran for each token of the answer, in its order; empty unless
            a report was asked for, and where several samples share the record.
        mask: layers that a prompt method left out, by module, or None.
        experts: what experts it ran, or None without expert controls.
    """

    counts: IntArray
    exits: IntArray
    compute_fraction: float
    generated_compute_fraction: float
    exit_layers: tuple[int, ...] = ()
    token_layers: tuple[int, ...] = ()
    mask: Mapping[str, list[int]] | None = None
    experts: ExpertUse | None = None

    def to_wire(self) -> dict[str, Any]:
        """As JSON values, which any of vLLM's ways from a worker carries."""
        return {
            "counts": self.counts.tolist(),
            "exits": self.exits.tolist(),
            "compute_fraction": self.compute_fraction,
            "generated_compute_fraction": self.generated_compute_fraction,
            "exit_layers": list(self.exit_layers),
            "token_layers": list(self.token_layers),
            "mask": self.mask,
            "experts": self.experts and self.experts.to_wire(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        experts = wire["experts"]
        return cls(
            counts=np.array(wire["counts"], dtype=np.int64),
            exits=np.array(wire["exits"], dtype=np.int64),
            compute_fraction=wire["compute_fraction"],
            generated_compute_fraction=wire["generated_compute_fraction"],
            exit_layers=tuple(wire["exit_layers"]),
            token_layers=tuple(wire["token_layers"]),
            mask=wire["mask"],
            experts=None if experts is None else ExpertUse.from_wire(experts),
        )


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
    """What the tokens of one request have run so far.

    Attributes:
        counts: as in `RoutingRecord`.
        exits: as in `RoutingRecord`.
        heads: rows that a token was sampled from, and rows that the LM head ran on, int64,
            (2 phases, 2).
        exit_layers: as in `RoutingRecord`.
        token_layers: as in `RoutingRecord`, by sample.
        skipped: the mask a prompt method decided on, bool, (layers, 2 modules), or None.
        experts: what the routers did, or None without expert controls.
    """

    counts: IntArray
    exits: IntArray
    heads: IntArray = field(default_factory=lambda: np.zeros((len(PHASES), 2), dtype=np.int64))
    exit_layers: list[int] = field(default_factory=list)
    token_layers: dict[str, list[int]] = field(default_factory=dict)
    skipped: BoolArray | None = None
    experts: ExpertSums | None = None

    def add_token(self, sample: str, index: int, layer: int) -> None:
        """Note the last layer that ran for a token of the answer.

        A token that is computed again after a preemption is noted already, and so ignored.

        Args:
            sample: which of the request's samples it belongs to.
            index: of the token in that answer, from 0.
            layer: 0-based.
        """
        layers = self.token_layers.setdefault(sample, [])
        if index == len(layers) < _MAX_TOKEN_LAYERS:
            layers.append(layer)

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
            token_layers=tuple(*self.token_layers.values()) if len(self.token_layers) == 1 else (),
            mask=mask,
            experts=None if self.experts is None else self.experts.use(),
        )


class RequestSumsByKey:
    """Sums of the requests that run or have just ended."""

    def __init__(self, num_layers: int) -> None:
        self._shape = (len(PHASES), num_layers, len(MODULES), len(OUTCOMES))
        self._sums: OrderedDict[str, RequestSums] = OrderedDict()

    def get(self, request_key: str) -> RequestSums:
        """The sums of a request, made on first use."""
        sums = self._sums.get(request_key)
        if sums is None:
            # A client that vanished between its last token and the take leaves its sums behind.
            while len(self._sums) >= _MAX_RECORDS:
                self._sums.popitem(last=False)
            sums = self._sums[request_key] = RequestSums(
                np.zeros(self._shape, dtype=np.int64), np.zeros(self._shape[1], dtype=np.int64)
            )
        return sums

    def take(self, request_key: str) -> RequestSums | None:
        """Hand sums out and forget them; None if the request never reached a step."""
        return self._sums.pop(request_key, None)
