"""Series about routed experts: what the engines have told by the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.models.policy.axes import FloatArray
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.engine_counters import Reading
from sluice.server.telemetry.engines import Engines

_NAN = float("nan")


def active_mean(window: Counts) -> FloatArray:
    """Experts per token row, (layers with experts,); NaN without rows."""
    return _ratio(window.by_expert.sum(axis=1), window.routed_rows)


def max_mean_ratio(window: Counts) -> FloatArray:
    """The busiest expert's selections over the mean expert's, by layer; NaN without any."""
    return _ratio(window.by_expert.max(axis=1, initial=0), window.by_expert.mean(axis=1))


def _ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> FloatArray:
    unknown = np.full(above.shape, _NAN)
    ratio: FloatArray = np.divide(above, below, out=unknown, where=below != 0)
    return ratio


class ExpertCollector(Collector):
    """Per-layer series of routed experts, and per-expert ones on demand."""

    def __init__(self, engines: Engines, *, per_expert: bool) -> None:
        self._engines = engines
        self._per_expert = per_expert

    def collect(self) -> Iterator[Metric]:
        """What the engines have told; a dense model has no series with a value."""
        layers = self._engines.expert_layers
        readings = self._engines.read() if layers else {}
        labels = ["engine", "layer"]
        active = GaugeMetricFamily(
            "sluice_experts_active_mean",
            "Routed experts per token row in the last window of work.",
            labels=labels,
        )
        load = GaugeMetricFamily(
            "sluice_expert_load_max_mean_ratio",
            "Selections of the busiest expert over the mean in the last window of work.",
            labels=labels,
        )
        masked = CounterMetricFamily(
            "sluice_expert_masked",
            "Expert selections that policies took away.",
            labels=labels,
        )
        for engine, reading in readings.items():
            for family, values in (
                (active, active_mean(reading.window)),
                (load, max_mean_ratio(reading.window)),
                (masked, reading.total.masked),
            ):
                for layer, value in zip(layers, values, strict=True):
                    family.add_metric([str(engine), str(layer)], float(value))
        yield active
        yield load
        yield masked
        if self._per_expert:
            yield _selections(layers, readings)


def _selections(layers: tuple[int, ...], readings: dict[int, Reading]) -> Metric:
    family = CounterMetricFamily(
        "sluice_expert_selections",
        "Selections of a routed expert.",
        labels=["engine", "layer", "expert"],
    )
    for engine, reading in readings.items():
        for layer, row in zip(layers, reading.total.by_expert, strict=True):
            for expert, count in enumerate(row):
                family.add_metric([str(engine), str(layer), str(expert)], float(count))
    return family
