"""The policies of the table: presets and adapters of the profile, LLM-Drop's orders, exits.

``python -m sluice.models.offline.real_model.policies --profile FOLDER --out FILE`` writes them as
JSON, `routing` objects by name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sluice.models.profile.layer_fields import AdapterFields
from sluice.models.profile.profile import Profile

LAYERS = 30
_BLOCKS = (1, 2, 4, 8)
_ATTENTIONS = (2, 4, 8, 15)
_EXITS = ((15, 0.9), (20, 0.9), (25, 0.5), (25, 0.9), (28, 0.99))
"""Layers that have run at an exit, and its threshold."""
_SPARING_EXITS = ((15, 0.9), (25, 0.9), (28, 0.99))

Policies = dict[str, Mapping[str, Any]]


def policies(presets: Mapping[str, str], adapters: Mapping[str, AdapterFields]) -> Policies:
    """All of them, by name.

    Args:
        presets: points of the profile's frontier by preset. Presets that are one point are one row.
        adapters: of the profile. Each is two rows: what it was trained for, without it and with it.
    """
    named: dict[str, list[str]] = {}
    for preset, point in presets.items():
        named.setdefault(point, []).append(preset)
    found: Policies = {}
    for names in named.values():
        found[f"preset {', '.join(f'`{name}`' for name in names)}"] = {"preset": names[0]}
    for unit, counts in (("block", _BLOCKS), ("attention", _ATTENTIONS)):
        for count in counts:
            name = f"{count} of {LAYERS} {unit}s left out"
            # Rounded to the nearest number of layers.
            skip = {"fraction": round(count / LAYERS, 3), "by": unit}
            found[name] = {"depth": {"skip": skip}}
    for count, threshold in _EXITS:
        found[_exit_name(count, threshold)] = _exit(count, threshold)
    for count, threshold in _SPARING_EXITS:
        name = f"{_exit_name(count, threshold)}, `sparing`"
        found[name] = _exit(count, threshold, sparing=True)
    for adapter, of in adapters.items():
        name = f"{len(of.mlp)} of {LAYERS} blocks left out of answers"
        skip = {"attention": [*of.attention], "mlp": [*of.mlp]}
        found[name] = {"depth": {"skip": skip, "phase": of.phase.value}}
        found[f"{name}, with adapter"] = {"depth": {"skip": {"adapter": adapter}}}
    return found


def _exit_name(count: int, threshold: float) -> str:
    return f"exit after {count} layers, confidence {threshold}"


def _exit(count: int, threshold: float, **more: bool) -> dict[str, Any]:
    rule = {"method": "confidence", "threshold": threshold, "layers": [count - 1], **more}
    return {"depth": {"exit": rule}}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.real_model.policies", description=__doc__
    )
    parser.add_argument("--profile", type=Path, required=True, help="the model's profile")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    fields = Profile.load(args.profile).fields
    found = policies({} if fields.frontier is None else fields.frontier.presets, fields.adapters)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
