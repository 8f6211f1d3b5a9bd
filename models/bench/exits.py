"""Exits that the demo model took, replayed on the benchmark's model.

`exits.json` holds, per policy, the layer after which each generated token left, request by request,
as `sluice demo eval --json` writes them (its `exit_layers`), with the policy's exact match and the
number of layers of the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.models.bench.model import LAYERS
from sluice.models.policy import ExitRule, RoutingPolicy

SHIPPED = Path(__file__).parent / "exits.json"


@dataclass(frozen=True, slots=True)
class RecordedExits:
    """Recorded exits by policy name.

    Attributes:
        layers: of the model they were recorded on.
        recorded: by policy name, an object with `exits`, a list of layers, and `tested`, the
            layers after which the policy tests.
    """

    layers: int
    recorded: dict[str, Any]

    @classmethod
    def load(cls, path: Path = SHIPPED) -> RecordedExits:
        """Read a recording."""
        content = json.loads(path.read_text())
        return cls(content["layers"], content["policies"])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the policies."""
        return tuple(self.recorded)

    def policies(self, name: str, batch: int) -> tuple[RoutingPolicy, ...]:
        """Policies that replay the recording; each request starts at another place in it."""
        exits, tested = self._exits(name), self.recorded[name]["tested"]
        layers = tuple(self._deep(layer) for layer in tested)
        starts = [i * len(exits) // batch for i in range(batch)]
        return tuple(
            RoutingPolicy(exit=ExitRule("replay", layers, script=exits[s:] + exits[:s]))
            for s in starts
        )

    def ideal(self, name: str) -> float:
        """Layers of the model over layers that the mean token runs."""
        exits = self._exits(name)
        return LAYERS / (sum(exits) / len(exits) + 1)

    def _exits(self, name: str) -> tuple[int, ...]:
        return tuple(self._deep(layer) for layer in self.recorded[name]["exits"])

    def _deep(self, layer: int) -> int:
        """The layer at the same share of the benchmark model's depth."""
        return round((layer + 1) * LAYERS / self.layers) - 1
