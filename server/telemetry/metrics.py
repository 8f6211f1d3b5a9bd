"""Names, labels and sources of the `sluice_*` series.

Series about requests are counted here, in the HTTP server. Series about layers are read from the
workers' counter files at the moment of a scrape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.models.policy.axes import EXECUTED, MODULES, OUTCOMES, IntArray
from sluice.models.routing.errors import REASONS, Reason
from sluice.models.routing.presets import RESERVED_NAMES
from sluice.models.telemetry.counter_file import at_work
from sluice.models.telemetry.layer_counters import SUFFIX, LayerCounters


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
        engines = [LayerCounters.read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
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


Outcome = Literal["ok", "rejected", "error", "aborted"]
_SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class RequestMetrics:
    """Counters of requests; every label set is known and exported from zero."""

    def __init__(self, presets: Iterable[str], registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "sluice_requests_total",
            "Generation requests by preset and outcome.",
            ["preset", "outcome"],
            registry=registry,
        )
        self._rejections = Counter(
            "sluice_policy_rejections_total",
            "Requests refused for their routing.",
            ["reason"],
            registry=registry,
        )
        self._compute_fraction = Histogram(
            "sluice_request_compute_fraction",
            "Share of full depth's compute that a request ran.",
            buckets=_SHARE_BUCKETS,
            registry=registry,
        )
        self._effort = Histogram(
            "sluice_effort_ratio",
            "Effort that admitted requests asked for, themselves or by their preset.",
            buckets=_SHARE_BUCKETS,
            registry=registry,
        )
        for preset in (*sorted(RESERVED_NAMES), *presets):
            for outcome in get_args(Outcome):
                self._requests.labels(preset, outcome)
        for reason in REASONS:
            self._rejections.labels(reason)

    def finished(self, preset: str, outcome: Outcome) -> None:
        """Count a request that ended."""
        self._requests.labels(preset, outcome).inc()

    def rejected(self, reason: Reason) -> None:
        """Count a refused policy."""
        self._rejections.labels(reason).inc()

    def asked(self, effort: float) -> None:
        """Observe the effort of an admitted request, in (0, 1]."""
        self._effort.observe(effort)

    def ran(self, compute_fraction: float) -> None:
        """Observe what share of full depth a request ran, in [0, 1]."""
        self._compute_fraction.observe(compute_fraction)


class LayerCollector(Collector):
    """Per-layer series, summed over the engines that write into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """Read the counter files; an engine that has not started yet has none."""
        use = LayerUse.read(self._folder)
        tokens = CounterMetricFamily(
            "sluice_layer_tokens",
            "Token rows by layer, module and what became of them.",
            labels=["layer", "module", "outcome"],
        )
        ratio = GaugeMetricFamily(
            "sluice_layer_utilization_ratio",
            "Share of token rows that executed a module in the last window of work.",
            labels=["layer", "module"],
        )
        exits = CounterMetricFamily(
            "sluice_exit_tokens",
            "Generated tokens by the last layer that they ran anything in.",
            labels=["layer"],
        )
        if use is not None:
            for layer, (totals, window) in enumerate(zip(use.totals, use.window, strict=True)):
                modules = by_outcome(totals).items()
                for (module, outcomes), recent in zip(modules, window, strict=True):
                    labels = [str(layer), module]
                    for outcome, count in outcomes.items():
                        tokens.add_metric([*labels, outcome], float(count))
                    rows = recent.sum()
                    share = recent[EXECUTED] / rows if rows else float("nan")
                    ratio.add_metric(labels, float(share))
            for layer, count in enumerate(use.exits):
                exits.add_metric([str(layer)], float(count))
        yield tokens
        yield exits
        yield ratio
