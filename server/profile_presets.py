"""Presets that were measured: points of a profile's frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sluice.models.profile import Profile, ProfileError
from sluice.models.profile_writer import JSON_NAME
from sluice.server.presets import PresetsFileError, is_preset_name, load_presets
from sluice.server.schema import PolicyFields, PresetFields, dotted


def all_presets(path: Path | None, profile: Profile | None) -> dict[str, PresetFields]:
    """The presets of a file and those of a profile.

    Raises:
        PresetsFileError: the file cannot be used, or a name is in both.
        ProfileError: a preset of the profile is no policy.
    """
    own = {} if path is None else load_presets(path)
    if profile is None:
        return own
    measured = profile_presets(profile)
    for name in own:
        if name in measured:
            raise PresetsFileError(
                f"preset {name!r} is in presets file {path} and in profile {profile.folder}: "
                "rename the one in the file"
            )
    return {**own, **measured}


def profile_presets(profile: Profile) -> dict[str, PresetFields]:
    """The presets of a profile's frontier.

    Raises:
        ProfileError: one has no preset's name, or its routing is malformed.
    """
    presets: dict[str, PresetFields] = {}
    for name, point in profile.presets.items():
        where = f"frontier.presets.{name}"
        if not is_preset_name(name):
            raise ProfileError(f"profile {profile.folder / JSON_NAME}: {where}: not a preset name")
        try:
            PolicyFields.model_validate(point.routing)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = dotted(f"{where}.routing", first["loc"])
            raise ProfileError(
                f"profile {profile.folder / JSON_NAME}: {path}: {first['msg']}"
            ) from None
        presets[name] = PresetFields(**point.routing, description=f"measured: {point.name}")
    return presets


def measured_preset(profile: Profile, name: str) -> dict[str, Any] | None:
    """What was measured of a preset, or None if it is not the profile's."""
    frontier, point = profile.frontier, profile.presets.get(name)
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
    }
