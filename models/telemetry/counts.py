"""What an engine counted: of one step, since it last told, or since the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from sluice.kernels.ops.router_config import EXTRA, MASKED, ROWS
from sluice.models.policy.axes import MODULES, OUTCOMES, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Sums over token rows; nobody writes to the arrays.

    Attributes:
        layers: token rows by layer, module and outcome, int64, (layers, 2, 3).
        exits: generated rows by the last layer that they ran anything in, int64, (layers,).
        selections: of experts, int64, (layers with experts, experts + 2); the two extra columns
            are `ROWS` and `MASKED`. (0, 2) where there are none.
    """

    layers: IntArray
    exits: IntArray
    selections: IntArray

    @classmethod
    def zeros(cls, num_layers: int, expert_layers: int = 0, experts: int = 0) -> Self:
        """Nothing.

        Args:
            num_layers: of the model.
            expert_layers: those with routed experts.
            experts: of such a layer.
        """
        return cls(
            np.zeros((num_layers, len(MODULES), len(OUTCOMES)), dtype=np.int64),
            np.zeros(num_layers, dtype=np.int64),
            np.zeros((expert_layers, experts + EXTRA), dtype=np.int64),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.layers + other.layers,
            self.exits + other.exits,
            _sum(self.selections, other.selections),
        )

    def __sub__(self, other: Counts) -> Counts:
        return self + Counts(-other.layers, -other.exits, -other.selections)

    @property
    def by_expert(self) -> IntArray:
        """Selections, (layers with experts, experts)."""
        return self.selections[:, :-EXTRA]

    @property
    def masked(self) -> IntArray:
        """Selections that policies took away, (layers with experts,)."""
        return self.selections[:, MASKED]

    @property
    def routed_rows(self) -> IntArray:
        """Token rows that were routed, (layers with experts,)."""
        return self.selections[:, ROWS]

    def to_wire(self) -> dict[str, Any]:
        """As what msgpack carries."""
        return {
            "layers": self.layers.tobytes(),
            "exits": self.exits.tobytes(),
            "selections": self.selections.tobytes(),
            "columns": self.selections.shape[1],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        layers, exits, selections = (
            np.frombuffer(wire[name], dtype=np.int64) for name in ("layers", "exits", "selections")
        )
        return cls(
            layers.reshape(len(exits), len(MODULES), len(OUTCOMES)),
            exits,
            selections.reshape(-1, wire["columns"]),
        )


def _sum(one: IntArray, other: IntArray) -> IntArray:
    """Selections added up; an engine that has routed nothing yet sends none."""
    if not len(other):
        return one
    return one + other if len(one) else other
