"""`routing.experts.deactivate`, `activate` and `bias`: experts by layer and number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertId
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import combination, in_range, invalid
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts.parameters import BIAS, WEIGHT
from sluice.models.routing.schema import ActivateFields, BiasFields, ExpertFields, NamedExperts

EXPERTS = "routing.experts"
DEACTIVATE, ACTIVATE, _BIAS = (f"{EXPERTS}.{name}" for name in ("deactivate", "activate", "bias"))


@dataclass(frozen=True, slots=True)
class ExpertLimits:
    """The experts of a model that one request may name.

    Attributes:
        shape: of the model's experts.
        layers: decoder layers.
        protected: super experts that the request does not give up.
    """

    shape: ExpertShape
    layers: int
    protected: frozenset[ExpertId]

    @classmethod
    def of(cls, fields: ExpertFields, capabilities: Capabilities) -> ExpertLimits:
        """Limits of one request.

        Raises:
            RoutingError: the engine runs no expert controls.
        """
        shape, refusal = capabilities.expert_shape, capabilities.expert_refusal
        if shape is None or refusal is not None:
            raise RoutingError(
                f"expert routing is not available: {refusal}",
                param=EXPERTS,
                reason="unsupported_model",
            )
        protect = fields.protect_super_experts is not False
        profile = capabilities.profile
        supers = profile.super_experts if profile is not None and protect else ()
        return cls(shape, capabilities.layers, frozenset(supers))

    def check_layer(self, layer: int, param: str) -> None:
        """A layer exists and has routed experts.

        Raises:
            RoutingError: names `param`.
        """
        if not 0 <= layer < self.layers:
            raise RoutingError(
                f"layer {layer} does not exist: the model has layers 0 to {self.layers - 1}",
                param=param,
                reason="layer_out_of_range",
            )
        if layer not in self.shape.layers:
            raise invalid(f"layer {layer} has no routed experts", param)

    def check_expert(self, expert: int, param: str) -> None:
        """An expert exists.

        Raises:
            RoutingError: names `param`.
        """
        if not 0 <= expert < self.shape.experts:
            raise RoutingError(
                f"expert {expert} does not exist: "
                f"a layer has experts 0 to {self.shape.experts - 1}",
                param=param,
                reason="expert_out_of_range",
            )

    def check_unprotected(self, named: ExpertId, param: str) -> None:
        """An expert is no super expert of the profile, or the request gives those up.

        Raises:
            RoutingError: names `param`.
        """
        if named in self.protected:
            layer, expert = named
            raise RoutingError(
                f"expert {expert} of layer {layer} is a super expert, which outputs collapse "
                "without: leave it in, or set protect_super_experts to false",
                param=param,
                reason="protected_expert",
            )


def deactivated(entries: Sequence[NamedExperts], limits: ExpertLimits) -> tuple[ExpertId, ...]:
    """Experts that do not serve, ascending.

    Raises:
        RoutingError: one that does not exist, is named twice or is protected.
    """
    experts = set()
    for named, _, param in _named(entries, limits, DEACTIVATE):
        limits.check_unprotected(named, param)
        experts.add(named)
    return tuple(sorted(experts))


def activated(
    entries: Sequence[ActivateFields], out: Sequence[ExpertId], limits: ExpertLimits
) -> tuple[tuple[int, int, float | None], ...]:
    """Experts that always serve, with their weights, ascending.

    Args:
        entries: what the client wrote.
        out: the deactivated ones.
        limits: of the request.

    Raises:
        RoutingError: one that does not exist, is named twice or is deactivated too, or a weight
            that is not positive.
    """
    weights: dict[ExpertId, float | None] = {}
    excluded = frozenset(out)
    for position, entry in enumerate(entries):
        if entry.weight is not None:
            in_range(entry.weight, WEIGHT, f"{ACTIVATE}.{position}.weight")
    for named, position, param in _named(entries, limits, ACTIVATE):
        if named in excluded:
            layer, expert = named
            raise combination(f"expert {expert} of layer {layer} is deactivated too", param)
        weights[named] = entries[position].weight
    return tuple((layer, expert, weights[layer, expert]) for layer, expert in sorted(weights))


def biased(
    entries: Sequence[BiasFields], limits: ExpertLimits
) -> tuple[tuple[int, int, float], ...]:
    """Numbers added to selection scores, ascending by layer and expert, without zeros.

    Raises:
        RoutingError: an expert that does not exist or is named twice, a number out of range, or a
            negative one on a protected expert.
    """
    values: dict[ExpertId, float] = {}
    for position, entry in enumerate(entries):
        param, named = f"{_BIAS}.{position}", (entry.layer, entry.expert)
        limits.check_layer(entry.layer, f"{param}.layer")
        limits.check_expert(entry.expert, f"{param}.expert")
        if named in values:
            raise _twice(named, f"{param}.expert")
        values[named] = in_range(entry.value, BIAS, f"{param}.value")
        if entry.value < 0:
            limits.check_unprotected(named, f"{param}.value")
    return tuple((*named, value) for named, value in sorted(values.items()) if value != 0)


def first_entry(entries: Sequence[NamedExperts], layer: int, root: str) -> str:
    """Dotted path of the first entry that names experts of a layer."""
    return next(
        f"{root}.{position}"
        for position, entry in enumerate(entries)
        if entry.layer == layer and entry.experts
    )


def _named(
    entries: Sequence[NamedExperts],
    limits: ExpertLimits,
    root: str,
) -> Iterator[tuple[ExpertId, int, str]]:
    """Every named expert, checked, with the position of its entry and its dotted path."""
    seen: set[ExpertId] = set()
    for position, entry in enumerate(entries):
        limits.check_layer(entry.layer, f"{root}.{position}.layer")
        for number, expert in enumerate(entry.experts):
            param, named = f"{root}.{position}.experts.{number}", (entry.layer, expert)
            limits.check_expert(expert, param)
            if named in seen:
                raise _twice(named, param)
            seen.add(named)
            yield named, position, param


def _twice(named: ExpertId, param: str) -> RoutingError:
    layer, expert = named
    return invalid(f"expert {expert} of layer {layer} is named twice", param)
