"""Experts that a profile names, against those of the model."""

from __future__ import annotations

from sluice.models.expert_shape import ExpertShape
from sluice.models.profile import Profile, ProfileError
from sluice.models.profile_fields import ReferenceSet
from sluice.server.rules.expert_controls import OWN_ENCODER


def check_profile_experts(profile: Profile, shape: ExpertShape | None) -> None:
    """Experts and layers with experts that a profile names exist in the model.

    Args:
        profile: fits the model's layers and hidden size.
        shape: of the model's experts; None for a dense model.

    Raises:
        ProfileError: names the first entry that does not.
    """
    lists = {"super_experts": profile.super_experts}
    for name, behaviour in profile.fields.behaviours.items():
        lists[f"behaviours.{name}.experts"] = behaviour.experts
    for path, named in lists.items():
        for position, (layer, expert) in enumerate(named):
            if not _has_layer(shape, layer) or not 0 <= expert < (shape.experts if shape else 0):
                raise _error(
                    profile,
                    f"{path}.{position}: the model has no expert {expert} in layer {layer}",
                )
    for name, held in profile.references.items():
        _check_references(profile, name, held, shape)


def _check_references(
    profile: Profile, name: str, held: ReferenceSet, shape: ExpertShape | None
) -> None:
    for layer in held.layers:
        if not _has_layer(shape, layer):
            raise _error(
                profile, f"references.{name}: layer {layer} of the model has no routed experts"
            )
    if not held.layers or [*held.layers] != sorted({*held.layers}):
        raise _error(profile, f"references.{name}: layers must be ascending, each named once")
    if held.encoder == OWN_ENCODER and held.width != profile.hidden:
        raise _error(
            profile,
            f"references.{name}: the model's embeddings are {profile.hidden} wide, "
            f"and these {held.width}",
        )


def _has_layer(shape: ExpertShape | None, layer: int) -> bool:
    return shape is not None and layer in shape.layers


def _error(profile: Profile, problem: str) -> ProfileError:
    return ProfileError(f"profile {profile.folder}: {problem}")
