"""`routing.depth.skip` and `routing.effort`: from their wire forms to a `SkipSet`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sluice.models.depth.skip_order import Unit, drop_order, skip_first
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.profile.frontier_fields import EffortLevel
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import check_layers, invalid
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import SkipFields

SKIP = "routing.depth.skip"
PHASE = "routing.depth.phase"
EFFORT = "routing.effort"
_LISTS = ("blocks", "attention", "mlp")
_SubLayer = tuple[Unit, int]


def skip_set(fields: SkipFields, given_phase: Phase | None, capabilities: Capabilities) -> SkipSet:
    """`routing.depth.skip`: named layers, a fraction of the drop order (LLM-Drop), or an adapter.

    A fraction leaves out the first `floor(fraction * units + 1/2)` of the units that `by` counts.
    An adapter leaves out what it was trained for, of the tokens that it was trained for.

    Raises:
        RoutingError: a layer that does not exist, half of a fraction, a fraction beside lists, one
            that rounds to no unit or to everything, or one of an order that nobody measured; an
            adapter that the profile does not have, or beside something else that chooses layers.
    """
    if fields.adapter is not None:
        return _adapted(fields, fields.adapter, given_phase, capabilities)
    phase = given_phase or Phase.BOTH
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
    order = _measured_order(fields.by, capabilities, f"{SKIP}.fraction")
    count = math.floor(fields.fraction * len(order) + 0.5)
    if count == 0:
        raise invalid(
            f"{fields.fraction:g} of {len(order)} units ({fields.by}) rounds to none",
            f"{SKIP}.fraction",
        )
    skip = skip_first(order, count, phase)
    check_something_runs(skip, capabilities, f"{SKIP}.fraction")
    return skip


def _adapted(
    fields: SkipFields, name: str, given_phase: Phase | None, capabilities: Capabilities
) -> SkipSet:
    others = [each for each in (*_LISTS, "fraction", "by") if each in fields.model_fields_set]
    if others:
        raise invalid(
            f"adapter leaves out the layers it was trained for, and {others[0]} chooses them "
            "otherwise: give one of the two",
            f"{SKIP}.{others[0]}",
        )
    adapter = capabilities.adapters.get(name)
    if adapter is None:
        known = ", ".join(capabilities.adapters) or "none; `sluice calibrate recover` trains them"
        raise RoutingError(
            f"adapter {name!r} is not in the profile (adapters: {known})",
            param=f"{SKIP}.adapter",
            reason="needs_profile",
        )
    if given_phase not in (None, adapter.phase):
        raise invalid(
            f"adapter {name!r} was trained for phase {adapter.phase.value!r}: leave the phase out",
            PHASE,
        )
    return SkipSet.of(
        attention=adapter.attention, mlp=adapter.mlp, phase=adapter.phase, adapter=name
    )


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


def effort_set(effort: float, phase: Phase, capabilities: Capabilities) -> SkipSet:
    """The sub-layers that an effort leaves out.

    Without levels: the first `floor((1 - effort) * layers + 1/2)` blocks of the drop order. With
    levels: see `_between`.

    Raises:
        RoutingError: nothing would be left to run, or nothing was measured, or not that far down.
    """
    levels = capabilities.effort_levels
    if levels:
        left_out = _between(effort, levels, capabilities)
    else:
        count = math.floor((1.0 - effort) * capabilities.layers + 0.5)
        left_out = _measured_order(Unit.BLOCK, capabilities, EFFORT)[:count] if count else []
    if not left_out:
        return SkipSet()
    skip = skip_first(left_out, len(left_out), phase, elastic=True)
    check_something_runs(skip, capabilities, EFFORT)
    return skip


def _between(
    effort: float, levels: Sequence[EffortLevel], capabilities: Capabilities
) -> list[_SubLayer]:
    """What an effort leaves out between two neighbouring levels.

    Let A be the lowest level at or above the effort (full depth is one, of effort 1) and B the
    next, of efforts a and b, and n the number of sub-layers that B leaves out beyond A. All of A
    goes, and of the n the first `floor(n * (a - effort) / (a - b) + 1/2)` in joint drop order, or
    deepest first where the profile has levels and no importance: each stands for an equal part of
    the way from a to b, and the set nearest the effort is taken. So a level's own effort is that
    level, and smaller efforts leave out no less.

    Raises:
        RoutingError: the effort lies below the lowest level.
    """
    fuller: frozenset[_SubLayer] = frozenset()
    above = 1.0
    for level in levels:
        skipped = _sub_layers(level)
        if effort >= level.effort:
            further = _ordered(skipped - fuller, capabilities)
            way = (above - effort) / (above - level.effort)
            return [*fuller, *further[: math.floor(len(further) * way + 0.5)]]
        fuller, above = skipped, level.effort
    raise invalid(f"{effort:g} is below {above:g}, the lowest effort that was measured", EFFORT)


def _measured_order(unit: Unit, capabilities: Capabilities, param: str) -> list[_SubLayer]:
    if capabilities.importance is None:
        message = f"{param.removeprefix('routing.')}: {capabilities.order_refusal}"
        raise RoutingError(message, param=param, reason="needs_profile")
    return drop_order(unit, capabilities.layers, capabilities.importance)


def _ordered(units: frozenset[_SubLayer], capabilities: Capabilities) -> list[_SubLayer]:
    """Units between two measured levels."""
    if capabilities.importance is None:
        return sorted(units, key=lambda unit: (-unit[1], unit[0]))
    order = drop_order(Unit.JOINT, capabilities.layers, capabilities.importance)
    return [unit for unit in order if unit in units]


def _sub_layers(level: EffortLevel) -> frozenset[_SubLayer]:
    attention = ((Unit.ATTENTION, layer) for layer in level.attention)
    return frozenset((*attention, *((Unit.MLP, layer) for layer in level.mlp)))
