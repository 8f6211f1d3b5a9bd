"""A profile with every part, of a model that is nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

MODEL = {"layers": 3, "hidden": 4, "fingerprint": "f" * 64}
EVEN = (0.5, 0.25, 0.125)
UNITS = {"block": EVEN, "attention": EVEN, "mlp": EVEN}
MEASURED = {"value": 0.9, "low": 0.8, "high": 1.0}
HEADS = {
    "classifier.weight": torch.arange(4.0),
    "classifier.bias": torch.tensor(0.5),
    "adapter.a.1.down": torch.ones(2, 4),
    "adapter.a.1.up": torch.ones(4, 2),
}
ADAPTER = {
    "attention": (1,),
    "mlp": (1,),
    "phase": "decode",
    "layers": (1,),
    "rank": 2,
    "prompts": 8,
    "held_out": 9,
    "before": MEASURED,
    "after": MEASURED,
    "divergence_before": 0.5,
    "divergence_after": 0.25,
}
REFERENCES = {"a.embeddings": torch.ones(2, 4), "a.pathways": torch.ones(2, 1, 8)}


def point(name: str, **routing: Any) -> dict[str, Any]:
    return {
        "name": name,
        "routing": routing,
        "quality": MEASURED,
        "speed": MEASURED,
        "compute_fraction": 0.75,
        "generated_fraction": 0.5,
        "on_frontier": True,
    }


def level(effort: float, attention: tuple[int, ...], mlp: tuple[int, ...]) -> dict[str, Any]:
    return {"effort": effort, "attention": attention, "mlp": mlp, "quality": MEASURED}


def frontier(
    points: Sequence[dict[str, Any]] = (point("full"),),
    presets: Mapping[str, str] = MappingProxyType({}),
    effort: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    return {
        "measure": "exact match",
        "items": 100,
        "batch": 8,
        "device": "a CPU",
        "points": [*points],
        "presets": {**presets},
        "effort": [*effort],
    }


FRONTIER = frontier(
    [point("full"), point("shallow", depth={"skip": {"blocks": [2]}})],
    {"quality": "full", "fast": "shallow"},
    [level(0.75, (2,), ()), level(0.5, (1, 2), (2,))],
)
EXIT = {
    "method": "confidence",
    "layers": (0, 1),
    "threshold": 0.9,
    "tolerance": 0.01,
    "error": 0.05,
    "agreement": 0.995,
    "mean_layers": 1.5,
}
FIELDS: dict[str, Any] = {
    "model": MODEL,
    "importance": UNITS,
    "layer_metrics": {
        "contribution": UNITS,
        **dict.fromkeys(("turn", "future_effect", "lim", "zd"), EVEN),
    },
    "exits": [EXIT],
    "saturation": EVEN,
    "super_experts": [(2, 1)],
    "expert_map": {"layers": (1, 2), "load": [EVEN, EVEN], "maxima": [EVEN, EVEN]},
    "behaviours": {
        "refusal": {"experts": [(1, 0)], "scores": (0.5,), "measure": "count", "prompts": (8, 9)}
    },
    "expert_k": [{"budget": 3, "top_k": (1, 1, 2), "divergence": 0.5}],
    "skip_ratios": EVEN,
    "references": {"a": {"layers": (2,), "width": 4}},
    "skip_sets": {"a": {"attention": (1, 2), "mlp": (), "quality": 0.5, "seconds": 0.75}},
    "adapters": {"a": ADAPTER},
    "frontier": FRONTIER,
}
