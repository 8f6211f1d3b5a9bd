"""`routing.experts`: from its wire form to an `ExpertPolicy`.

Every control has a module of its own: `expert_ids`, `expert_cuts`, `expert_budget`, `remix_rule`,
`contrast_rule`; `expert_floor` sees to it that enough experts stay.
"""

from __future__ import annotations

from dataclasses import replace

from sluice.models.expert_policy import STOCK_EXPERTS, ExpertPolicy
from sluice.server.capabilities import Capabilities
from sluice.server.rules.checks import combination, invalid
from sluice.server.rules.contrast_rule import CONTRAST, contrast_rule
from sluice.server.rules.expert_budget import budget_rule
from sluice.server.rules.expert_cuts import (
    experts_per_token,
    skip_ratio_rule,
    top_k_rule,
    top_p_rule,
)
from sluice.server.rules.expert_floor import check_floor
from sluice.server.rules.expert_ids import activated, biased, deactivated
from sluice.server.rules.expert_limits import EXPERTS, ExpertLimits
from sluice.server.rules.remix_rule import remix_rule
from sluice.server.schema import ExpertFields

_DROP = "drop"
_TOGETHER = {"deactivate", "mode"}
_PERMISSION = "protect_super_experts"


def merge_experts(own: ExpertFields | None, base: ExpertFields | None) -> ExpertFields | None:
    """The fields of a request over those of its preset.

    Each field that is given replaces the preset's; `deactivate` and `mode` replace both of the
    preset's if either is given.
    """
    if own is None or base is None:
        return base if own is None else own
    given = {name for name in own.model_fields_set if getattr(own, name) is not None}
    if given & _TOGETHER:
        given |= _TOGETHER
    return base.model_copy(update={name: getattr(own, name) for name in given})


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
