"""The record of an ended request, which its report is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sluice.models.policy.axes import IntArray


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


@dataclass(frozen=True, slots=True, eq=False)
class RoutingRecord:
    """What an ended request ran; samples of one request share a record.

    Attributes:
        counts: token rows, int64, (2 phases, layers, 2 modules, 3 outcomes).
        exits: generated rows by the last layer that they ran anything in, int64, (layers,).
        compute_fraction: share of full depth's compute on all tokens.
        generated_compute_fraction: the same on generated tokens.
        exit_layers: layer after which each generated token under an exit rule left, in the order
            in which they ran; of several samples, one after the other.
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
