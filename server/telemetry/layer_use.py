"""What ran per layer and module, read from the workers' counter files at the moment of a scrape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from sluice.models.counter_file import IntArray, at_work
from sluice.models.depth.skip import MODULES
from sluice.models.plan import OUTCOMES
from sluice.models.telemetry import LayerCounters


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What the engines that write into a folder have counted, summed.

    Attributes:
        totals: int64, (layers, 2 modules, 3 outcomes), token rows since start.
        window: int64, (layers, 2 modules, 3 outcomes), in the last one to two windows,
            of the engines that worked in them.
        exits: int64, (layers,), generated tokens since start by the last layer that they ran.
    """

    totals: IntArray
    window: IntArray
    exits: IntArray

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Sum over the engines; None before an engine has started."""
        engines = [LayerCounters.read(path) for path in sorted(folder.glob("*.counts"))]
        if not engines:
            return None
        return cls(
            totals=np.sum([engine.totals for engine in engines], axis=0),
            window=np.sum([engine.window for engine in at_work(engines)], axis=0),
            exits=np.sum([engine.exits for engine in engines], axis=0),
        )


def by_outcome(counts: IntArray) -> dict[str, dict[str, int]]:
    """Token rows of one layer by module and outcome; only attention can be filled.

    Args:
        counts: int64, (2 modules, 3 outcomes).
    """
    return {
        module: {
            outcome: int(count)
            for outcome, count in zip(OUTCOMES, row, strict=True)
            if (module, outcome) != ("mlp", "filled")
        }
        for module, row in zip(MODULES, counts, strict=True)
    }
