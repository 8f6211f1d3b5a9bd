"""`routing.depth.exit` of a method that decides per token: from its wire form to an `ExitRule`."""

from __future__ import annotations

from collections.abc import Sequence

from sluice.models.depth.exits.fixed import NAME as FIXED
from sluice.models.depth.registry import EXIT_METHODS
from sluice.models.policy.policy import ExitRule, MissingKV
from sluice.models.profile.fields import ExitThreshold
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import check_fields, check_layers, check_trained, invalid, number
from sluice.models.routing.schema import ExitFields

EXIT = "routing.depth.exit"
_ALWAYS_TAKEN = ("layers", "min_layer", "kv")


def exit_rule(fields: ExitFields, capabilities: Capabilities) -> ExitRule:
    """Check a per-token exit against its method and the model.

    Without a threshold, that of the profile is taken if one was calibrated for the method: with
    its layers, or with those that are given if they are the same.

    Raises:
        RoutingError: unknown or untrained method, a number that the method does not take, misses
            or refuses, layers where no token can leave, or others than a threshold's own.
    """
    method = EXIT_METHODS.get(fields.method)
    if method is None:
        known = ", ".join([*EXIT_METHODS, FIXED])
        raise invalid(f"exit method {fields.method!r} does not exist ({known})", f"{EXIT}.method")
    check_trained(method, capabilities, EXIT)
    taken = (*_ALWAYS_TAKEN, *method.parameters, *(["decay"] if method.decays else []))
    check_fields(fields, taken, method.name, EXIT)
    calibrated = capabilities.calibrated_exits(method.name)
    if calibrated and fields.threshold is None:
        fields = _with_calibrated(fields, calibrated, capabilities.layers)
    numbers = {
        name: number(getattr(fields, name), parameter, method.name, f"{EXIT}.{name}")
        for name, parameter in method.parameters.items()
    }
    patience = numbers.get("patience")
    return ExitRule(
        method=method.name,
        layers=_exit_layers(fields, capabilities.layers),
        threshold=numbers.get("threshold"),
        patience=None if patience is None else int(patience),
        decay=fields.decay,
        kv=fields.kv or MissingKV.PROPAGATE,
    )


def _with_calibrated(
    fields: ExitFields, calibrated: Sequence[ExitThreshold], num_layers: int
) -> ExitFields:
    """Fields without a threshold, with one that the profile has for their layers.

    Raises:
        RoutingError: none was calibrated for these layers, or with a decay.
    """
    param = f"{EXIT}.threshold"
    if fields.decay is not None:
        raise invalid("the calibrated threshold holds without decay: name one beside decay", param)
    asked = calibrated[0].layers
    if fields.layers is not None or fields.min_layer is not None:
        asked = _exit_layers(fields, num_layers)
    for entry in calibrated:
        if entry.layers == asked:
            return fields.model_copy(update={"threshold": entry.threshold, "layers": [*asked]})
    sets = " or ".join(_enumerated(entry.layers) for entry in calibrated)
    raise invalid(
        f"the threshold of {fields.method!r} was calibrated for exits after layers {sets}, "
        f"and these are {_enumerated(asked)}: name a threshold, or leave the layers out",
        param,
    )


def _enumerated(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _exit_layers(fields: ExitFields, num_layers: int) -> tuple[int, ...]:
    """Layers after which a token may leave, ascending."""
    last = num_layers - 1
    first = 0
    if fields.min_layer is not None:
        first = fields.min_layer
        if not 0 <= first < last:
            raise invalid(
                f"layer {first} is no exit: the model has exits after layers 0 to {last - 1}",
                f"{EXIT}.min_layer",
            )
    if fields.layers is None:
        if last == 0:
            raise invalid("a model of one layer has no exit", EXIT)
        return tuple(range(first, last))
    param = f"{EXIT}.layers"
    if not fields.layers:
        raise invalid("a token needs at least one layer to leave after", param)
    check_layers(fields.layers, num_layers, param)
    seen: set[int] = set()
    for position, layer in enumerate(fields.layers):
        where = f"{param}.{position}"
        if layer == last:
            raise invalid(f"layer {layer} is the last: leaving there is no exit", where)
        if layer < first:
            raise invalid(f"layer {layer} lies below min_layer {first}", where)
        if layer in seen:
            raise invalid(f"layer {layer} is named twice", where)
        seen.add(layer)
    return tuple(sorted(seen))
