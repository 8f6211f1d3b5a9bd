"""What named layers and experts are checked against."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.models.expert_policy import ExpertId
from sluice.models.expert_shape import ExpertShape
from sluice.server.capabilities import Capabilities
from sluice.server.errors import RoutingError
from sluice.server.rules.checks import invalid
from sluice.server.schema import ExpertFields

EXPERTS = "routing.experts"


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
