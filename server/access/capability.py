"""Who may ask for what: one check on the parsed policy, whatever the endpoint or the field.

Removing experts can remove refusals, so expert controls need the server's `--expert-routing` and a
key that may. A preset is the operator's choice: any caller may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import RoutingFields


class ForbiddenError(RoutingError):
    """The policy is a good one, and this caller may not have it, or not on this server."""

    status = 403
    kind = "PermissionDeniedError"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, reason="forbidden")


_EXPERTS = "routing.experts"
_PROTECT = f"{_EXPERTS}.protect_super_experts"


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
        id: of the key in the keys file, or None where nobody is told apart.
        capability: what the caller may ask for.
    """

    id: str | None
    capability: Capability


# A field of `routing` that is missing here fails with a KeyError: nothing is allowed by accident.
_NEEDED = {
    "preset": Capability.BASIC,
    "report": Capability.BASIC,
    "depth": Capability.DEPTH,
    "effort": Capability.DEPTH,
    "experts": Capability.EXPERTS,
}


def check_access(
    own: RoutingFields,
    merged: RoutingFields,
    preset_param: str,
    caller: Caller,
    *,
    expert_routing: bool,
) -> None:
    """A caller may ask for this policy, and the server may run it.

    A field counts as soon as it is given: `experts: {}` asks for nothing and still needs the key.

    Args:
        own: fields that the client wrote.
        merged: those with the preset's filled in.
        preset_param: dotted path of what selected the preset.
        caller: who asks.
        expert_routing: the server's `--expert-routing`.

    Raises:
        ForbiddenError: names the field that is not allowed.
    """
    if merged.experts is not None and not expert_routing:
        raise ForbiddenError(
            "expert routing is off on this server (--expert-routing turns it on)",
            param=preset_param if own.experts is None else _EXPERTS,
        )
    for name in RoutingFields.model_fields:
        if name in own.model_fields_set and getattr(own, name) is not None:
            _check_capability(caller, _NEEDED[name], f"routing.{name}")
    # A preset may give super experts up, and that does not cover what the client adds to it.
    unprotected = merged.experts is not None and merged.experts.protect_super_experts is False
    if own.experts is not None and unprotected:
        _check_capability(caller, Capability.ADMIN, _PROTECT)


def _check_capability(caller: Caller, needed: Capability, param: str) -> None:
    if not caller.capability.covers(needed):
        raise ForbiddenError(
            f"{param} needs a key of capability {needed.value!r}; "
            f"this one has {caller.capability.value!r}",
            param=param,
        )
