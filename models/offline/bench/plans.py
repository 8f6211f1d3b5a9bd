"""What requests to the demo model ran, replayed on the benchmark's dense model.

`plans.json` holds, per policy: the `routing` object; its exact match; `tested`, the layers after
which an exit was tested; `exits`, the layer after which each generated token left; `skips`, for
each request the layers whose attention and MLP its generated tokens left out; `bars`, the ratio to
stock vLLM that the project promises, by batch. Recorded by ``python -m
sluice.models.offline.bench.record``, all but the bars.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.models.offline.bench.model import LAYERS
from sluice.models.policy.policy import ExitRule, Phase, RoutingPolicy, SkipSet

SHIPPED = Path(__file__).parent / "plans.json"


@dataclass(frozen=True, slots=True)
class RecordedPlans:
    """Recorded plans by policy name.

    Attributes:
        layers: of the model they were recorded on.
        recorded: by policy name; see the module.
    """

    layers: int
    recorded: dict[str, Any]

    @classmethod
    def load(cls, path: Path = SHIPPED) -> RecordedPlans:
        """Read a recording."""
        content = json.loads(path.read_text())
        return cls(content["layers"], content["policies"])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the policies."""
        return tuple(self.recorded)

    def policies(self, name: str, batch: int) -> tuple[RoutingPolicy, ...]:
        """Policies that replay the recording; each request starts at another place in it."""
        exits, skips = self._exits(name), self.recorded[name]["skips"]
        policies = []
        for number in range(batch):
            rule, skip = None, SkipSet()
            if exits:
                start = number * len(exits) // batch
                layers = tuple(self._exit(layer) for layer in self.recorded[name]["tested"])
                rule = ExitRule("replay", layers, script=exits[start:] + exits[:start])
            if skips:
                skip = self._skip(skips[number * len(skips) // batch])
            policies.append(RoutingPolicy(skip, exit=rule))
        return tuple(policies)

    def bars(self, name: str) -> dict[int, float]:
        """Promised ratio by batch."""
        return {int(batch): bar for batch, bar in self.recorded[name]["bars"].items()}

    def ideal(self, name: str) -> float:
        """Layers of the model over layers that the mean token runs."""
        exits = self._exits(name) or (LAYERS - 1,)
        sets = [self._skip(each) for each in self.recorded[name]["skips"]] or [SkipSet()]
        ran = [_blocks(skip, layer) for skip in sets for layer in exits]
        return LAYERS * len(ran) / sum(ran)

    def _exits(self, name: str) -> tuple[int, ...]:
        return tuple(self._exit(layer) for layer in self.recorded[name]["exits"])

    def _exit(self, layer: int) -> int:
        """The layer at the same share of the benchmark model's depth."""
        return round((layer + 1) * LAYERS / self.layers) - 1

    def _skip(self, plan: dict[str, list[int]]) -> SkipSet:
        """The layers at the same places of the benchmark model's depth."""
        attention, mlp = (
            tuple(layer for layer in range(LAYERS) if layer * self.layers // LAYERS in plan[module])
            for module in ("attention", "mlp")
        )
        return SkipSet.of(attention=attention, mlp=mlp, phase=Phase.DECODE)


def _blocks(skip: SkipSet, last: int) -> float:
    """Blocks up to a layer that a skip set leaves; half a block is an attention or an MLP."""
    out = [layer for layer in (*skip.attention, *skip.mlp) if layer <= last]
    return last + 1 - len(out) / 2
