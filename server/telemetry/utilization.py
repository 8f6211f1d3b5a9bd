"""Body of `GET /v1/routing/utilization`: what ran, per layer, module and expert."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.engine_counters import at_work
from sluice.models.telemetry.ledger import WINDOW_SECONDS
from sluice.server.telemetry.engines import Engines
from sluice.server.telemetry.metrics import by_outcome


def utilization(engines: Engines) -> dict[str, Any]:
    """Counts since start and in the last one to two windows, summed over engines."""
    readings = [*engines.read().values()]
    layers: list[dict[str, Any]] = []
    exits: list[dict[str, Any]] = []
    experts = None
    if readings:
        total = reduce(add, [reading.total for reading in readings])
        window = reduce(add, [reading.window for reading in at_work(readings)])
        layers = [
            {"layer": layer, **by_outcome(counts), "window": by_outcome(recent)}
            for layer, (counts, recent) in enumerate(zip(total.layers, window.layers, strict=True))
        ]
        exits = [{"layer": layer, "tokens": int(n)} for layer, n in enumerate(total.exits)]
        if engines.expert_layers:
            experts = _experts(engines.expert_layers, total, window)
    return {
        "object": "routing.utilization",
        "window_seconds": WINDOW_SECONDS,
        "layers": layers,
        "exits": exits,
        "experts": experts,
    }


def _experts(layers: tuple[int, ...], total: Counts, window: Counts) -> dict[str, Any]:
    return {
        "layers": list(layers),
        "experts": total.by_expert.shape[1],
        "selections": total.by_expert.tolist(),
        "window": window.by_expert.tolist(),
        "window_rows": window.routed_rows.tolist(),
        "masked": total.masked.tolist(),
    }
