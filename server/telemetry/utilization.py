"""Body of `GET /v1/routing/utilization`: what ran, per layer, module and expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sluice.models.telemetry.counter_file import WINDOW_SECONDS
from sluice.server.telemetry.expert_metrics import ExpertUse
from sluice.server.telemetry.metrics import LayerUse, by_outcome


def utilization(folder: Path) -> dict[str, Any]:
    """Counts since start and in the last one to two windows, summed over engines.

    Args:
        folder: of the engines' counter files.
    """
    use = LayerUse.read(folder)
    layers: list[dict[str, Any]] = []
    exits: list[dict[str, Any]] = []
    if use is not None:
        layers = [
            {"layer": layer, **by_outcome(totals), "window": by_outcome(window)}
            for layer, (totals, window) in enumerate(zip(use.totals, use.window, strict=True))
        ]
        exits = [{"layer": layer, "tokens": int(tokens)} for layer, tokens in enumerate(use.exits)]
    return {
        "object": "routing.utilization",
        "window_seconds": WINDOW_SECONDS,
        "layers": layers,
        "exits": exits,
        "experts": _experts(ExpertUse.read(folder)),
    }


def _experts(use: ExpertUse | None) -> dict[str, Any] | None:
    if use is None:
        return None
    return {
        "layers": list(use.layers),
        "experts": use.selections.shape[1],
        "selections": use.selections.tolist(),
        "window": use.window.tolist(),
        "window_rows": use.window_rows.tolist(),
        "masked": use.masked.tolist(),
    }
