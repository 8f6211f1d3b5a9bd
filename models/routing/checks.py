"""Checks that several controls of `routing` share; each failure names the dotted field."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from sluice.models.depth.method import DepthMethod
from sluice.models.depth.parameters import Choice, Flag, LayerShares, Number, Parameter
from sluice.models.policy.policy import ParameterValue
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import MethodFields, StrictFields

Real = TypeVar("Real", int, float)


def invalid(message: str, param: str) -> RoutingError:
    """The error for a field whose value cannot be meant."""
    return RoutingError(message, param=param, reason="invalid_field")


def combination(message: str, param: str) -> RoutingError:
    """The error for two controls that do not go together."""
    return RoutingError(message, param=param, reason="unsupported_combination")


def check_layers(layers: Sequence[int], num_layers: int, param: str) -> None:
    """Every layer of a list exists.

    Raises:
        RoutingError: names the list's first layer outside [0, num_layers).
    """
    for position, layer in enumerate(layers):
        if not 0 <= layer < num_layers:
            raise RoutingError(
                f"layer {layer} does not exist: the model has layers 0 to {num_layers - 1}",
                param=f"{param}.{position}",
                reason="layer_out_of_range",
            )


def check_trained(method: DepthMethod, capabilities: Capabilities, root: str) -> None:
    """The profile has what was trained for a method.

    Raises:
        RoutingError: it has not, or there is no profile.
    """
    missing = capabilities.missing_for(method)
    if missing is not None:
        raise RoutingError(missing, param=f"{root}.method", reason="needs_profile")


def check_fields(fields: StrictFields, taken: Collection[str], method: str, root: str) -> None:
    """No field was given that the method takes no notice of.

    Args:
        fields: what the client wrote, with a `method`; fields left at None were not given.
        taken: names of the fields that the method reads.
        method: its name.
        root: dotted path of `fields`.

    Raises:
        RoutingError: names the first such field.
    """
    for name in type(fields).model_fields:
        if name not in ("method", *taken) and getattr(fields, name) is not None:
            raise invalid(f"{name} means nothing to method {method!r}", f"{root}.{name}")


def parameter_values(
    fields: MethodFields, method: DepthMethod, capabilities: Capabilities, root: str
) -> dict[str, ParameterValue | None]:
    """What a method takes: what was given, or defaults; None where the method has its own.

    Args:
        fields: what the client wrote.
        method: that they name.
        capabilities: of the engine.
        root: dotted path of `fields`.

    Raises:
        RoutingError: a parameter is missing, or its method, the model or the engine refuse it.
    """
    given = fields.parameters
    return {
        name: _parameter_value(given.get(name), parameter, method.name, capabilities, root, name)
        for name, parameter in method.parameters.items()
    }


def _parameter_value(
    given: Any,
    parameter: Parameter,
    method: str,
    capabilities: Capabilities,
    root: str,
    name: str,
) -> ParameterValue | None:
    param = f"{root}.{name}"
    match parameter:
        case Number():
            if given is None and parameter.optional:
                return None
            value = number(given, parameter, method, param)
            return int(value) if parameter.integer else value
        case Choice():
            word: str = parameter.default if given is None else given
            if word not in parameter.values:
                raise invalid(f"{name} {word!r} is none of {', '.join(parameter.values)}", param)
            return word
        case Flag():
            if given and parameter.needs_whole_prompt and capabilities.chunked_prefill:
                raise combination(
                    f"{name} needs the whole prompt in one step: "
                    "start the server with --no-enable-chunked-prefill",
                    param,
                )
            return bool(given)
        case LayerShares():
            if given is not None and len(given) != capabilities.layers:
                raise invalid(
                    f"{name} has {len(given)} numbers, and the model {capabilities.layers} layers",
                    param,
                )
            return None if given is None else tuple(given)


def number(value: float | None, parameter: Number, method: str, param: str) -> float:
    """A method's number: what was given, or its default.

    Raises:
        RoutingError: missing without a default, or outside the parameter's range.
    """
    if value is None:
        if parameter.default is None:
            name = param.rpartition(".")[2]
            raise invalid(f"method {method!r} needs a {name}: it has no default", param)
        return parameter.default
    return in_range(value, parameter, param)


def in_range(value: Real, parameter: Number, param: str) -> Real:
    """A number that its parameter allows.

    Raises:
        RoutingError: it lies outside.
    """
    if not parameter.low <= value <= parameter.high:
        # A whole number may be too large for a float, and so for `:g`.
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
        raise invalid(f"{shown} is outside {parameter.low:g} to {parameter.high:g}", param)
    return value
