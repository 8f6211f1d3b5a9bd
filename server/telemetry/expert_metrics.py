"""Series about routed experts, read from the workers' counter files at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.models.policy.axes import FloatArray, IntArray
from sluice.models.telemetry.counter_file import at_work
from sluice.models.telemetry.expert_counters import SUFFIX, ExpertCounters

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """What the engines that write into a folder have counted, summed.

    Attributes:
        layers: decoder layers that have routed experts, ascending.
        selections: int64, (layers, experts), since start.
        masked: int64, (layers,), selections that policies took away since start.
        window: int64, (layers, experts), selections in the last one to two windows, of the
            engines that worked in them.
        window_rows: int64, (layers,), token rows routed in them.
    """

    layers: tuple[int, ...]
    selections: IntArray
    masked: IntArray
    window: IntArray
    window_rows: IntArray

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Sum over the engines; None for a dense model, or before an engine has started."""
        engines = [ExpertCounters.read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
        if not engines:
            return None
        recent = at_work(engines)
        return cls(
            layers=engines[0].layers,
            selections=np.sum([engine.selections for engine in engines], axis=0),
            masked=np.sum([engine.masked for engine in engines], axis=0),
            window=np.sum([engine.window for engine in recent], axis=0),
            window_rows=np.sum([engine.window_rows for engine in recent], axis=0),
        )

    def active_mean(self) -> FloatArray:
        """Experts per token row in the window, (layers,); NaN without rows."""
        return _ratio(self.window.sum(axis=1), self.window_rows)

    def max_mean_ratio(self) -> FloatArray:
        """The busiest expert's selections over the mean expert's, (layers,); NaN without any."""
        return _ratio(self.window.max(axis=1), self.window.mean(axis=1))


def _ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> FloatArray:
    unknown = np.full(above.shape, _NAN)
    ratio: FloatArray = np.divide(above, below, out=unknown, where=below != 0)
    return ratio


class ExpertCollector(Collector):
    """Per-layer series of routed experts, and per-expert ones on demand."""

    def __init__(self, folder: Path, *, per_expert: bool) -> None:
        self._folder = folder
        self._per_expert = per_expert

    def collect(self) -> Iterator[Metric]:
        """Read the counter files; a dense model has none, and no series with a value."""
        use = ExpertUse.read(self._folder)
        active = GaugeMetricFamily(
            "sluice_experts_active_mean",
            "Routed experts per token row in the last window of work.",
            labels=["layer"],
        )
        load = GaugeMetricFamily(
            "sluice_expert_load_max_mean_ratio",
            "Selections of the busiest expert over the mean in the last window of work.",
            labels=["layer"],
        )
        masked = CounterMetricFamily(
            "sluice_expert_masked",
            "Expert selections that policies took away.",
            labels=["layer"],
        )
        if use is not None:
            for family, values in (
                (active, use.active_mean()),
                (load, use.max_mean_ratio()),
                (masked, use.masked),
            ):
                for layer, value in zip(use.layers, values, strict=True):
                    family.add_metric([str(layer)], float(value))
        yield active
        yield load
        yield masked
        if self._per_expert:
            yield _selections(use)


def _selections(use: ExpertUse | None) -> Metric:
    family = CounterMetricFamily(
        "sluice_expert_selections",
        "Selections of a routed expert.",
        labels=["layer", "expert"],
    )
    if use is not None:
        for layer, row in zip(use.layers, use.selections, strict=True):
            for expert, count in enumerate(row):
                family.add_metric([str(layer), str(expert)], float(count))
    return family
