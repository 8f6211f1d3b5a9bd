"""Presets: named policies of a YAML or JSON file, and those of a profile.

presets:
  shallow:
    description: leaves out two blocks while decoding
    depth: {skip: {blocks: [5, 6]}, phase: decode}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.profile.writer import JSON_NAME
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.problems import first_problem
from sluice.models.routing.resolve import merge_preset, resolve
from sluice.models.routing.schema import (
    PolicyFields,
    PresetFields,
    RoutingFields,
    StrictFields,
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NO_PRESET = "none"
CUSTOM_PRESET = "custom"
RESERVED_NAMES = frozenset({NO_PRESET, CUSTOM_PRESET})
"""Labels of `sluice_requests_total` for requests without a preset."""

MODEL_SEPARATOR = "@"
_CLASHES = frozenset({"unsupported_combination", "nothing_left_to_run"})


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
        where, text = first_problem(error, str(path))
        raise PresetsFileError(f"presets file {where}: {text}") from None
    for name in presets:
        if not is_preset_name(name):
            raise PresetsFileError(
                f"presets file {path}: {name!r} is not a preset name (lower-case letters, digits, "
                f"'.', '_', '-', at most 64, and not {' or '.join(sorted(RESERVED_NAMES))})"
            )
    return presets


def all_presets(path: Path | None, profile: Profile | None) -> dict[str, PresetFields]:
    """The presets of a file and those of a profile.

    Raises:
        PresetsFileError: the file cannot be used, or a name is in both.
        ProfileError: a preset of the profile is not a policy.
    """
    presets = {} if path is None else load_presets(path)
    if profile is None:
        return presets
    measured = profile_presets(profile)
    for name in presets:
        if name in measured:
            raise PresetsFileError(
                f"preset {name!r} is in presets file {path} and in profile {profile.folder}: "
                "rename the one in the file"
            )
    return {**presets, **measured}


def profile_presets(profile: Profile) -> dict[str, PresetFields]:
    """The presets of a profile's frontier.

    Raises:
        ProfileError: a name is not a preset's, or the routing is malformed.
    """
    presets: dict[str, PresetFields] = {}
    for name, point in profile.presets.items():
        where = f"frontier.presets.{name}"
        if not is_preset_name(name):
            raise ProfileError(f"profile {profile.folder / JSON_NAME}: {where}: not a preset name")
        try:
            PolicyFields.model_validate(point.routing)
        except ValidationError as error:
            path, text = first_problem(error, f"{where}.routing")
            raise ProfileError(f"profile {profile.folder / JSON_NAME}: {path}: {text}") from None
        presets[name] = PresetFields(**point.routing, description=f"measured: {point.name}")
    return presets


def preset_policy(
    name: str, presets: Mapping[str, PresetFields], capabilities: Capabilities
) -> RoutingPolicy:
    """The policy that a preset alone gives.

    Raises:
        RoutingError: the preset does not exist, or asks for something this engine cannot do.
    """
    return resolve(
        merge_preset(RoutingFields(preset=name), presets, "routing.preset"), capabilities
    )


def request_policy(
    fields: RoutingFields,
    presets: Mapping[str, PresetFields],
    capabilities: Capabilities,
    preset_param: str = "routing.preset",
) -> RoutingPolicy:
    """The policy of a request.

    Args:
        fields: of the request, its preset's filled in (`merge_preset`).
        presets: by name.
        capabilities: of the engine that is to run it.
        preset_param: dotted path of what selected the preset.

    Raises:
        RoutingError: the engine cannot run it. If it cannot run the preset alone either, for the
            same reason, the error names the preset.
    """
    try:
        return resolve(fields, capabilities)
    except RoutingError as error:
        if fields.preset is None:
            raise
        try:
            preset_policy(fields.preset, presets, capabilities)
        except RoutingError as preset_error:
            if preset_error.message == error.message:
                message = f"preset {fields.preset!r} is not available: {error.message}"
                raise RoutingError(message, param=preset_param, reason=error.reason) from None
        if error.reason not in _CLASHES:
            raise
        brings = ", ".join(preset_controls(presets[fields.preset])) or "nothing"
        message = f"{error.message} (preset {fields.preset!r} brings {brings})"
        raise RoutingError(message, param=error.param, reason=error.reason) from None


def preset_controls(preset: PresetFields) -> list[str]:
    """The controls that a preset sets, as paths below `routing`."""
    given = preset.model_dump(exclude_defaults=True)
    nested = [f"{part}.{name}" for part in ("depth", "experts") for name in given.get(part) or ()]
    return nested + (["effort"] if preset.effort is not None else [])


def check_presets(presets: Mapping[str, PresetFields], capabilities: Capabilities) -> None:
    """Check that the engine can run every preset of the file.

    The profile's own presets are not checked: they may have been measured on another engine, and
    one that does not run here is listed as not available.

    Raises:
        RoutingError: a preset asks for something this engine cannot do; `param` names it.
    """
    measured = capabilities.profile.presets if capabilities.profile else {}
    for name in presets:
        if name in measured:
            continue
        try:
            preset_policy(name, presets, capabilities)
        except RoutingError as error:
            param = error.param.replace("routing", f"presets.{name}", 1)
            raise RoutingError(error.message, param=param, reason=error.reason) from None


def measured_preset(capabilities: Capabilities, name: str) -> dict[str, Any] | None:
    """What was measured of a preset, or None if it is not the profile's."""
    profile = capabilities.profile
    frontier = None if profile is None else profile.frontier
    point = None if profile is None else profile.presets.get(name)
    if frontier is None or point is None:
        return None
    return {
        "point": point.name,
        "quality": {"measure": frontier.measure, **point.quality.model_dump()},
        "speed": point.speed.model_dump(),
        "compute_fraction": point.compute_fraction,
        "generated_compute_fraction": point.generated_fraction,
        "items": frontier.items,
        "batch": frontier.batch,
        "device": frontier.device,
        "mode": frontier.mode,
        "warning": capabilities.speed_warning,
    }
