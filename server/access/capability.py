"""Who may ask for what: one check of the parsed policy, the same on every endpoint.

Removing experts can remove a model's refusals. So expert controls need the server's
`--expert-routing` and a key of that capability. A preset is the operator's choice, and any caller
may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import RoutingFields

_EXPERTS = "routing.experts"
_PROTECT = f"{_EXPERTS}.protect_super_experts"


class ForbiddenError(RoutingError):
    """The policy is valid, but not for this caller or not on this server: 403."""

    status = 403
    kind = "PermissionDeniedError"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, reason="forbidden")


class Capability(StrEnum):
    """What a key may ask for; each includes the ones before it."""

    BASIC = "basic"
    DEPTH = "depth"
    EXPERTS = "experts"
    ADMIN = "admin"

    def covers(self, needed: Capability) -> bool:
        """Whether a key of this capability may do what needs `needed`."""
        order = [*Capability]
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        id: of the key in the keys file, or None for a caller without a key.
        capability: what the caller may ask for.
    """

    id: str | None
    capability: Capability


# A new field of `routing` that is missing here raises KeyError, and is not allowed by accident.
_NEEDED = {
    "preset": Capability.BASIC,
    "report": Capability.BASIC,
    "depth": Capability.DEPTH,
    "effort": Capability.DEPTH,
    "experts": Capability.EXPERTS,
}


def check_access(
    fields: RoutingFields,
    merged: RoutingFields,
    preset_param: str,
    caller: Caller,
    *,
    expert_routing: bool,
) -> None:
    """Check that a caller may ask for a policy, and that the server may run it.

    A field counts as soon as it is given: `experts: {}` asks for nothing and still needs the key.

    Args:
        fields: what the client wrote.
        merged: the same with the preset's fields filled in.
        preset_param: dotted path of what selected the preset.
        caller: who sent the request.
        expert_routing: the server's `--expert-routing`.

    Raises:
        ForbiddenError: names the field that is not allowed.
    """
    if merged.experts is not None and not expert_routing:
        raise ForbiddenError(
            "expert routing is off on this server (--expert-routing turns it on)",
            param=preset_param if fields.experts is None else _EXPERTS,
        )
    for name in RoutingFields.model_fields:
        if name in fields.model_fields_set and getattr(fields, name) is not None:
            _check_capability(caller, _NEEDED[name], f"routing.{name}")
    # A preset may lift the protection for itself, not for experts that the client adds to it.
    unprotected = merged.experts is not None and merged.experts.protect_super_experts is False
    if fields.experts is not None and unprotected:
        _check_capability(caller, Capability.ADMIN, _PROTECT)


def _check_capability(caller: Caller, needed: Capability, param: str) -> None:
    if not caller.capability.covers(needed):
        raise ForbiddenError(
            f"{param} needs a key of capability {needed.value!r}; "
            f"this one has {caller.capability.value!r}",
            param=param,
        )
