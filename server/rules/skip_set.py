"""Skip sets from their wire forms: named layers, a fraction, a fixed exit."""

from __future__ import annotations

import math

from sluice.models.depth.fixed import NAME as FIXED
from sluice.models.depth.fixed import blocks_behind
from sluice.models.depth.order import drop_order, skip_first
from sluice.models.policy import Phase, SkipSet
from sluice.server.capabilities import Capabilities
from sluice.server.errors import RoutingError
from sluice.server.rules.checks import check_fields, check_layers, invalid
from sluice.server.schema import ExitFields, SkipFields

SKIP = "routing.depth.skip"
_EXIT = "routing.depth.exit"
_LISTS = ("blocks", "attention", "mlp")


def skip_set(fields: SkipFields, phase: Phase, capabilities: Capabilities) -> SkipSet:
    """`routing.depth.skip`: named layers, or a fraction of the drop order (LLM-Drop).

    A fraction leaves out the first `floor(fraction * units + 1/2)` of the units that `by` counts.

    Raises:
        RoutingError: a layer that does not exist, half of a fraction, a fraction beside lists, or
            one that rounds to no unit or to everything.
    """
    if fields.fraction is not None or fields.by is not None:
        return _fraction(fields, phase, capabilities)
    for name in _LISTS:
        check_layers(getattr(fields, name), capabilities.layers, f"{SKIP}.{name}")
    skip = SkipSet.of(
        blocks=tuple(fields.blocks),
        attention=tuple(fields.attention),
        mlp=tuple(fields.mlp),
        phase=phase,
    )
    check_something_runs(skip, capabilities, SKIP)
    return skip


def _fraction(fields: SkipFields, phase: Phase, capabilities: Capabilities) -> SkipSet:
    if fields.fraction is None or fields.by is None:
        missing, given = ("fraction", "by") if fields.fraction is None else ("by", "fraction")
        raise invalid(f"{given} needs {missing} beside it", f"{SKIP}.{missing}")
    lists = [name for name in _LISTS if name in fields.model_fields_set]
    if lists:
        raise invalid(
            f"fraction chooses the layers, and {lists[0]} names them: give one of the two",
            f"{SKIP}.{lists[0]}",
        )
    order = drop_order(fields.by, capabilities.layers, capabilities.importance)
    count = math.floor(fields.fraction * len(order) + 0.5)
    if count == 0:
        raise invalid(
            f"{fields.fraction:g} of {len(order)} units ({fields.by}) rounds to none",
            f"{SKIP}.fraction",
        )
    skip = skip_first(order, count, phase)
    check_something_runs(skip, capabilities, f"{SKIP}.fraction")
    return skip


def fixed_exit(
    fields: ExitFields, skip: SkipSet, phase: Phase, capabilities: Capabilities
) -> SkipSet:
    """`routing.depth.exit` with method `fixed`: `skip`, and every block behind the exit layer.

    Raises:
        RoutingError: not exactly one layer, the last one, one that does not exist, a field of the
            other methods, or a layer before which `skip` leaves nothing to run.
    """
    check_fields(fields, ("layers",), FIXED, _EXIT)
    layers, param = fields.layers or [], f"{_EXIT}.layers"
    if len(layers) != 1:
        raise invalid(f"method {FIXED!r} needs exactly one layer, not {len(layers)}", param)
    check_layers(layers, capabilities.layers, param)
    blocks = blocks_behind(layers[0], capabilities.layers)
    if not blocks:
        raise invalid(f"layer {layers[0]} is the last: leaving there is no exit", f"{param}.0")
    merged = SkipSet.of(blocks=blocks, attention=skip.attention, mlp=skip.mlp, phase=phase)
    check_something_runs(merged, capabilities, param)
    return merged


def check_something_runs(skip: SkipSet, capabilities: Capabilities, param: str) -> None:
    """At least one sub-layer is left.

    Raises:
        RoutingError: none is.
    """
    if len(skip.attention) == len(skip.mlp) == capabilities.layers:
        raise RoutingError(
            f"{param} leaves nothing to run: keep at least one attention or MLP",
            param=param,
            reason="nothing_left_to_run",
        )
