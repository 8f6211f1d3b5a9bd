"""Named policies from a YAML or JSON file.

presets:
  shallow:
    description: leaves out two blocks while decoding
    depth: {skip: {blocks: [5, 6]}, phase: decode}
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from sluice.server.schema import PresetFields, StrictFields, dotted

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NO_PRESET = "none"
CUSTOM_PRESET = "custom"
RESERVED_NAMES = frozenset({NO_PRESET, CUSTOM_PRESET})
"""Labels of `sluice_requests_total` for requests without a preset."""

MODEL_SEPARATOR = "@"


class PresetsFileError(ValueError):
    """A presets file cannot be used; the message names the file and the entry."""


class _PresetsFile(StrictFields):
    presets: dict[str, PresetFields]


def is_preset_name(name: str) -> bool:
    """Whether a preset may have this name."""
    return NAME.fullmatch(name) is not None and name not in RESERVED_NAMES


def load_presets(path: Path) -> dict[str, PresetFields]:
    """Read a presets file (JSON is YAML).

    Raises:
        PresetsFileError: the file is missing, not YAML, or an entry is not a valid policy.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PresetsFileError(f"presets file {path}: {error}") from error
    try:
        presets = _PresetsFile.model_validate(content).presets
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = dotted(str(path), first["loc"]) if first["loc"] else str(path)
        raise PresetsFileError(f"presets file {where}: {first['msg']}") from None
    for name in presets:
        if not is_preset_name(name):
            raise PresetsFileError(
                f"presets file {path}: {name!r} is not a preset name (lower-case letters, digits, "
                f"'.', '_', '-', at most 64, and not {' or '.join(sorted(RESERVED_NAMES))})"
            )
    return presets
