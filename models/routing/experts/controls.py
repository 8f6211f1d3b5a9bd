"""`routing.experts`: from its wire form to an `ExpertPolicy`.

Here are the cuts (`top_k`, `top_p`, `skip_ratio`), the budget and the contrast. Experts by number
are in `named`, the re-mix in `remix`; `floor` sees to it that enough experts stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from sluice.models.depth.parameters import Number
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import (
    STOCK_EXPERTS,
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertPolicy,
)
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import check_fields, combination, in_range, invalid, number
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts import parameters as controls
from sluice.models.routing.experts.floor import check_floor
from sluice.models.routing.experts.named import (
    EXPERTS,
    ExpertLimits,
    activated,
    biased,
    deactivated,
)
from sluice.models.routing.experts.remix import remix_rule
from sluice.models.routing.schema import BudgetFields, ContrastFields, ExpertFields

CONTRAST = f"{EXPERTS}.contrast"
_BUDGET = f"{EXPERTS}.budget"
_DROP = "drop"
_TOGETHER = {"deactivate", "mode"}
_PERMISSION = "protect_super_experts"
_Number = TypeVar("_Number", int, float)


def merge_experts(request: ExpertFields | None, preset: ExpertFields | None) -> ExpertFields | None:
    """The fields of a request over those of its preset.

    Each field that is given replaces the preset's; `deactivate` and `mode` replace both of the
    preset's if either is given.
    """
    if request is None or preset is None:
        return preset if request is None else request
    given = {name for name in request.model_fields_set if getattr(request, name) is not None}
    if given & _TOGETHER:
        given |= _TOGETHER
    return preset.model_copy(update={name: getattr(request, name) for name in given})


def expert_rule(fields: ExpertFields | None, capabilities: Capabilities) -> ExpertPolicy:
    """Check the expert controls against each other, the model and the profile.

    What changes nothing is left out, so that a policy that asks for nothing is the stock one.

    Raises:
        RoutingError: the engine runs no expert controls, one that cannot be done on this model,
            too few experts left, or controls that do not go together.
    """
    if fields is None or not _asks(fields):
        return STOCK_EXPERTS
    limits = ExpertLimits.of(fields, capabilities)
    if fields.mode is not None and fields.deactivate is None:
        raise invalid("mode has nothing to act on without deactivate", f"{EXPERTS}.mode")
    deactivate, activate = fields.deactivate or [], fields.activate or []
    top_k = top_k_rule(fields.top_k, limits)
    wanted = experts_per_token(top_k, limits)
    out = deactivated(deactivate, limits)
    policy = ExpertPolicy(
        masked=() if fields.mode == _DROP else out,
        dropped=out if fields.mode == _DROP else (),
        forced=activated(activate, out, limits),
        bias=biased(fields.bias or [], limits),
        top_k=top_k,
        top_p=top_p_rule(fields.top_p),
        skip_ratio=skip_ratio_rule(fields.skip_ratio, limits),
        protect=fields.protect_super_experts is not False,
    )
    if fields.budget is not None:
        budget = budget_rule(fields.budget, min(wanted.values()), limits.shape)
        policy = replace(policy, budget=budget)
    check_floor(policy, wanted, limits.shape, deactivate, activate)
    if fields.remix is not None:
        remix = remix_rule(fields.remix, wanted, capabilities.references, limits)
        policy = replace(policy, remix=remix)
    if fields.contrast is not None:
        contrast = contrast_rule(fields.contrast, capabilities.contrast_refusal, limits)
        if not policy.empty:
            raise combination("contrast does not go together with other expert controls", CONTRAST)
        policy = replace(policy, contrast=contrast)
    return STOCK_EXPERTS if policy.empty else policy


def _asks(fields: ExpertFields) -> bool:
    """Whether any control is given; an empty list of entries names nothing."""
    return any(
        getattr(fields, name) is not None
        for name in ExpertFields.model_fields
        if name not in (_PERMISSION, "deactivate", "activate", "bias")
    ) or any((fields.deactivate, fields.activate, fields.bias))


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
    parameter: Number,
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


def budget_rule(fields: BudgetFields, least: int, shape: ExpertShape) -> ExpertBudget:
    """Check a budget against its method and the model.

    Args:
        fields: what the client wrote.
        least: experts per token, of the layer where they are fewest.
        shape: of the model's experts.

    Raises:
        RoutingError: the method's number is missing or out of range, or the other's was given.
    """
    oea = fields.method is BudgetMethod.OEA
    name = "k0" if oea else "experts"
    check_fields(fields, (name,), fields.method.value, _BUDGET)
    value = fields.k0 if oea else fields.experts
    if value is None:
        raise invalid(f"method {fields.method.value!r} needs {name}", f"{_BUDGET}.{name}")
    parameter = controls.oea_k0(least) if oea else controls.budget_experts(shape)
    in_range(value, parameter, f"{_BUDGET}.{name}")
    return ExpertBudget(fields.method, k0=fields.k0, experts=fields.experts)


def contrast_rule(fields: ContrastFields, refusal: str | None, limits: ExpertLimits) -> Contrast:
    """Check a contrast against the model and the engine.

    Args:
        fields: what the client wrote.
        refusal: why the engine cannot run a second pass, or None.
        limits: of the request.

    Raises:
        RoutingError: the engine cannot, or a number out of range.
    """
    if refusal is not None:
        raise RoutingError(
            f"contrast is not available: {refusal}", param=CONTRAST, reason="unsupported_model"
        )
    rank = in_range(fields.weak_rank, controls.weak_rank(limits.shape), f"{CONTRAST}.weak_rank")
    return Contrast(
        weak_rank=rank,
        beta=number(fields.beta, controls.BETA, "contrast", f"{CONTRAST}.beta"),
        alpha=number(fields.alpha, controls.CONTRAST_ALPHA, "contrast", f"{CONTRAST}.alpha"),
    )
