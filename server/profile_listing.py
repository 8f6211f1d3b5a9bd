"""What a profile holds, as `/v1/routing/capabilities` lists it: values to copy into a request."""

from __future__ import annotations

from typing import Any

from sluice.models.profile import Profile


def effort_listing(profile: Profile | None, layers: int) -> dict[str, Any]:
    """Where `effort` comes from and how low it goes.

    Args:
        profile: the one the server was started with.
        layers: of the model.

    Returns:
        `source` is `frontier`, or `importance` or `default` for the order in which blocks go;
        `lowest` is the effort of the last level, or that of a single block.
    """
    frontier = profile.frontier if profile is not None else None
    if frontier is not None and frontier.effort:
        return {
            "source": "frontier",
            "lowest": frontier.effort[-1].effort,
            "measure": frontier.measure,
            "levels": [level.model_dump(mode="json") for level in frontier.effort],
        }
    ordered = profile is not None and profile.importance is not None
    return {
        "source": "importance" if ordered else "default",
        "lowest": 1.0 / layers,
        "measure": None,
        "levels": [],
    }


def skip_set_listing(profile: Profile | None) -> dict[str, Any]:
    """Skip sets by name; `attention` and `mlp` go into `depth.skip` with phase `decode`."""
    found = profile.fields.skip_sets if profile is not None else {}
    return {name: held.model_dump(mode="json") for name, held in found.items()}


def profile_experts_listing(profile: Profile | None) -> dict[str, Any]:
    """Behaviours' experts, experts per layer (LExI) and skip ratios (NAEE)."""
    fields = profile.fields if profile is not None else None
    behaviours = fields.behaviours if fields is not None else {}
    levels = fields.expert_k if fields is not None else ()
    ratios = fields.skip_ratios if fields is not None else None
    return {
        "behaviours": {name: held.model_dump(mode="json") for name, held in behaviours.items()},
        "expert_k": [level.model_dump(mode="json") for level in levels],
        "skip_ratios": None if ratios is None else [*ratios],
    }
