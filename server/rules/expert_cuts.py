"""`routing.experts.top_k`, `top_p` and `skip_ratio`: fewer or more experts per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from sluice.models.depth.method import Parameter
from sluice.server.rules import expert_controls as controls
from sluice.server.rules.checks import in_range, invalid
from sluice.server.rules.expert_limits import EXPERTS, ExpertLimits

_Number = TypeVar("_Number", int, float)


def top_k_rule(given: int | list[int] | None, limits: ExpertLimits) -> int | tuple[int, ...] | None:
    """Experts per token: one number, one per decoder layer, or None for the model's own.

    Raises:
        RoutingError: a number under 1 or over what a token can reach, or a list of another length
            than the model.
    """
    parameter = controls.top_k(limits.shape)
    return _per_layer(given, parameter, limits.shape.top_k, limits, f"{EXPERTS}.top_k")


def skip_ratio_rule(
    given: float | list[float] | None, limits: ExpertLimits
) -> float | tuple[float, ...] | None:
    """Least share of the first rank's score: one number, one per decoder layer, or None.

    Raises:
        RoutingError: a number outside [0, 1], or a list of another length than the model.
    """
    return _per_layer(given, controls.SKIP_RATIO, 0.0, limits, f"{EXPERTS}.skip_ratio")


def top_p_rule(given: float | None) -> float | None:
    """Share of the score after which ranks leave; None where all of it is kept."""
    return None if given == 1.0 else given


def experts_per_token(
    top_k: int | tuple[int, ...] | None, limits: ExpertLimits
) -> Mapping[int, int]:
    """Experts per token of every layer that has them, under `top_k_rule`'s answer."""
    if isinstance(top_k, tuple):
        return {layer: top_k[layer] for layer in limits.shape.layers}
    return dict.fromkeys(limits.shape.layers, limits.shape.top_k if top_k is None else top_k)


def _per_layer(
    given: _Number | list[_Number] | None,
    parameter: Parameter,
    neutral: _Number,
    limits: ExpertLimits,
    param: str,
) -> _Number | tuple[_Number, ...] | None:
    """A list of equals is one number; the neutral number is None. Dense layers do not count."""
    if given is None:
        return None
    if isinstance(given, list):
        if len(given) != limits.layers:
            raise invalid(
                f"a list needs one entry per decoder layer: it has {len(given)}, and the model "
                f"{limits.layers} layers",
                param,
            )
        for layer, value in enumerate(given):
            in_range(value, parameter, f"{param}.{layer}")
        values = {given[layer] for layer in limits.shape.layers}
        if len(values) > 1:
            return tuple(given)
        given = values.pop()
    in_range(given, parameter, param)
    return None if given == neutral else given
