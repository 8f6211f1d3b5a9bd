"""`routing.depth.exit`: from its wire form to an `ExitRule`, or to a skip set if it is static."""

from __future__ import annotations

from collections.abc import Sequence

from sluice.models.depth.method import ExitMethod, StaticExit
from sluice.models.depth.registry import offered_exits
from sluice.models.policy.policy import ExitRule, MissingKV, Phase, SkipSet
from sluice.models.profile.layer_fields import ExitThreshold
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import (
    check_fields,
    check_layers,
    check_trained,
    combination,
    invalid,
    parameter_values,
)
from sluice.models.routing.depth.skip import check_something_runs
from sluice.models.routing.schema import ExitFields

EXIT = "routing.depth.exit"
_ALWAYS_TAKEN = ("layers", "min_layer", "kv")


def is_static(fields: ExitFields | None) -> bool:
    """Whether these are fields of an exit that decides nothing while the model runs."""
    return fields is not None and isinstance(offered_exits().get(fields.method), StaticExit)


def exit_control(
    fields: ExitFields, skip: SkipSet, phase: Phase, capabilities: Capabilities
) -> tuple[SkipSet, ExitRule | None]:
    """Check an exit against its method and the model.

    Args:
        fields: what the client wrote.
        skip: what `depth.skip` leaves out.
        phase: of the tokens that a static exit acts on.
        capabilities: of the engine.

    Returns:
        What is left out with a static exit beside `skip`, and the rule of an exit that is not.

    Raises:
        RoutingError: unknown or untrained method, a parameter that the method does not take,
            misses or refuses, layers where no token can leave, or an exit that does not go together
            with `skip`.
    """
    method = offered_exits().get(fields.method)
    if method is None:
        known = ", ".join(offered_exits())
        raise invalid(f"exit method {fields.method!r} does not exist ({known})", f"{EXIT}.method")
    check_trained(method, capabilities, EXIT)
    if isinstance(method, StaticExit):
        return _static_exit(fields, method, skip, phase, capabilities), None
    rule = _exit_rule(fields, method, capabilities)
    if rule.kv is MissingKV.RECOMPUTE and not skip.empty:
        raise combination(
            "kv recompute leaves full depth behind: it does not go together with depth.skip",
            f"{EXIT}.kv",
        )
    return skip, rule


def _static_exit(
    fields: ExitFields,
    method: StaticExit,
    skip: SkipSet,
    phase: Phase,
    capabilities: Capabilities,
) -> SkipSet:
    """`skip`, and what the method leaves out."""
    check_fields(fields, ("layers",), method.name, EXIT)
    layers, param = fields.layers or [], f"{EXIT}.layers"
    if len(layers) != 1:
        raise invalid(f"method {method.name!r} needs exactly one layer, not {len(layers)}", param)
    check_layers(layers, capabilities.layers, param)
    blocks = method.skipped_blocks(layers[0], capabilities.layers)
    if not blocks:
        raise invalid(f"layer {layers[0]} is the last: leaving there is no exit", f"{param}.0")
    merged = SkipSet.of(blocks=blocks, attention=skip.attention, mlp=skip.mlp, phase=phase)
    check_something_runs(merged, capabilities, param)
    return merged


def _exit_rule(fields: ExitFields, method: ExitMethod, capabilities: Capabilities) -> ExitRule:
    """The rule of a method that decides per token.

    Without a threshold, that of the profile is taken if one was calibrated for the method: with
    its layers, or with those that are given if they are the same.
    """
    taken = [*_ALWAYS_TAKEN, *method.parameters]
    taken += [*(["decay"] if method.decays else []), *(["sparing"] if method.needs_logits else [])]
    check_fields(fields, taken, method.name, EXIT)
    calibrated = capabilities.calibrated_exits(method.name)
    if calibrated and "threshold" not in fields.parameters:
        fields = _with_calibrated(fields, calibrated, capabilities.layers)
    return ExitRule(
        method.name,
        _exit_layers(fields, capabilities.layers),
        decay=fields.decay,
        sparing=fields.sparing or False,
        kv=fields.kv or MissingKV.PROPAGATE,
        **parameter_values(fields, method, capabilities, EXIT),
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
    layers = calibrated[0].layers
    if fields.layers is not None or fields.min_layer is not None:
        layers = _exit_layers(fields, num_layers)
    for entry in calibrated:
        if entry.layers == layers:
            return fields.model_copy(update={"threshold": entry.threshold, "layers": [*layers]})
    sets = " or ".join(_enumerated(entry.layers) for entry in calibrated)
    raise invalid(
        f"the threshold of {fields.method!r} was calibrated for exits after layers {sets}, "
        f"and these are {_enumerated(layers)}: name a threshold, or leave the layers out",
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
