"""`routing.depth.adaptive`: from its wire form to an `AdaptiveRule`."""

from __future__ import annotations

from sluice.models.depth.method import ParameterError
from sluice.models.depth.registry import adaptive_methods
from sluice.models.policy.policy import AdaptiveRule
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import check_fields, check_trained, invalid, parameter_values
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import AdaptiveFields

ADAPTIVE = "routing.depth.adaptive"


def adaptive_rule(fields: AdaptiveFields, capabilities: Capabilities) -> AdaptiveRule:
    """Check an adaptive control against its method, the model and the engine.

    Raises:
        RoutingError: unknown or untrained method, a field that the method does not take, misses
            or refuses, or one that would leave out nothing or everything.
    """
    method = adaptive_methods().get(fields.method)
    if method is None:
        known = ", ".join(adaptive_methods())
        raise invalid(
            f"adaptive method {fields.method!r} does not exist ({known})", f"{ADAPTIVE}.method"
        )
    check_trained(method, capabilities, ADAPTIVE)
    check_fields(fields, method.parameters, method.name, ADAPTIVE)
    rule = AdaptiveRule(method.name, **parameter_values(fields, method, capabilities, ADAPTIVE))
    try:
        method.check(rule, capabilities.layers)
    except ParameterError as error:
        raise RoutingError(
            error.message,
            param=f"{ADAPTIVE}.{error.name}",
            reason="nothing_left_to_run" if error.leaves_nothing else "invalid_field",
        ) from None
    return rule
