"""`routing.experts.deactivate`, `activate` and `bias`: experts by layer and number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sluice.models.expert_policy import ExpertId
from sluice.server.errors import RoutingError
from sluice.server.rules.checks import combination, in_range, invalid
from sluice.server.rules.expert_controls import BIAS, WEIGHT
from sluice.server.rules.expert_limits import EXPERTS, ExpertLimits
from sluice.server.schema import ActivateFields, BiasFields, NamedExperts

DEACTIVATE, ACTIVATE, _BIAS = (f"{EXPERTS}.{name}" for name in ("deactivate", "activate", "bias"))


def deactivated(entries: Sequence[NamedExperts], limits: ExpertLimits) -> tuple[ExpertId, ...]:
    """Experts that do not serve, ascending.

    Raises:
        RoutingError: one that does not exist, is named twice or is protected.
    """
    found = set()
    for named, _, param in _named(entries, limits, DEACTIVATE):
        limits.check_unprotected(named, param)
        found.add(named)
    return tuple(sorted(found))


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
        for place, expert in enumerate(entry.experts):
            param, named = f"{root}.{position}.experts.{place}", (entry.layer, expert)
            limits.check_expert(expert, param)
            if named in seen:
                raise _twice(named, param)
            seen.add(named)
            yield named, position, param


def _twice(named: ExpertId, param: str) -> RoutingError:
    layer, expert = named
    return invalid(f"expert {expert} of layer {layer} is named twice", param)
