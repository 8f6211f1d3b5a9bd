"""Names, labels and sources of the `sluice_*` series.

Series about requests are counted here, in the HTTP server. Series about layers are what the engines
have told by the moment of a scrape; their label `engine` is that of vLLM's own series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.models.policy.axes import EXECUTED, MODULES, OUTCOMES, IntArray
from sluice.models.routing.errors import REASONS, Reason
from sluice.models.routing.presets import RESERVED_NAMES
from sluice.server.telemetry.engines import Engines


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
    """Series by layer."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """What the engines have told; one that has not started has told nothing."""
        tokens = CounterMetricFamily(
            "sluice_layer_tokens",
            "Token rows by layer, module and what became of them.",
            labels=["engine", "layer", "module", "outcome"],
        )
        ratio = GaugeMetricFamily(
            "sluice_layer_utilization_ratio",
            "Share of token rows that executed a module in the last window of work.",
            labels=["engine", "layer", "module"],
        )
        exits = CounterMetricFamily(
            "sluice_exit_tokens",
            "Generated tokens by the last layer that they ran anything in.",
            labels=["engine", "layer"],
        )
        for index, reading in self._engines.read().items():
            engine, total = str(index), reading.total
            for layer, (counts, window) in enumerate(
                zip(total.layers, reading.window.layers, strict=True)
            ):
                modules = by_outcome(counts).items()
                for (module, outcomes), recent in zip(modules, window, strict=True):
                    labels = [engine, str(layer), module]
                    for outcome, count in outcomes.items():
                        tokens.add_metric([*labels, outcome], float(count))
                    rows = recent.sum()
                    share = recent[EXECUTED] / rows if rows else float("nan")
                    ratio.add_metric(labels, float(share))
            for layer, count in enumerate(total.exits):
                exits.add_metric([engine, str(layer)], float(count))
        yield tokens
        yield exits
        yield ratio
