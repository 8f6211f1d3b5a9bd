"""Body of `GET /v1/routing/utilization`: what ran, per layer, module and expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sluice.models.depth.skip import MODULES
from sluice.models.plan import OUTCOMES
from sluice.models.telemetry import WINDOW_SECONDS, IntArray, LayerCounters
from sluice.server.telemetry.expert_metrics import ExpertUse


def utilization(folder: Path) -> dict[str, Any]:
    """Counts since start and in the last one to two windows, summed over engines.

    Args:
        folder: of the engines' counter files.
    """
    engines = [LayerCounters.read(path) for path in sorted(folder.glob("*.counts"))]
    layers: list[dict[str, Any]] = []
    exits: list[dict[str, Any]] = []
    if engines:
        totals = np.sum([engine.totals for engine in engines], axis=0)
        window = np.sum([engine.window for engine in engines], axis=0)
        layers = [
            {"layer": layer, **_modules(totals[layer]), "window": _modules(window[layer])}
            for layer in range(len(totals))
        ]
        left = np.sum([engine.exits for engine in engines], axis=0)
        exits = [{"layer": layer, "tokens": int(tokens)} for layer, tokens in enumerate(left)]
    return {
        "object": "routing.utilization",
        "window_seconds": WINDOW_SECONDS,
        "layers": layers,
        "exits": exits,
        "experts": _experts(ExpertUse.read(folder)),
    }


def _modules(counts: IntArray) -> dict[str, dict[str, int]]:
    """Outcomes by module of one layer; only attention can be filled."""
    return {
        module: {
            outcome: int(count)
            for outcome, count in zip(OUTCOMES, row, strict=True)
            if (module, outcome) != ("mlp", "filled")
        }
        for module, row in zip(MODULES, counts, strict=True)
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
