"""`experts_routing` of `/v1/routing/capabilities`: the expert controls this engine runs."""

from __future__ import annotations

from typing import Any

from sluice.models.depth.method import Parameter
from sluice.models.expert_policy import RemixMethod, RemixScope
from sluice.models.expert_shape import ExpertShape
from sluice.models.profile import Profile
from sluice.server.listed import choice, listed, number, numbers
from sluice.server.profile_listing import profile_experts_listing
from sluice.server.rules import expert_controls as controls


def expert_listing(
    shape: ExpertShape | None,
    refusal: str | None,
    contrast_refusal: str | None,
    profile: Profile | None,
    *,
    enabled: bool,
) -> dict[str, Any]:
    """The engine's experts and what can be asked of them.

    Args:
        shape: of the model's experts, or None if there are none.
        refusal: why no expert control can be done, or None.
        contrast_refusal: why no contrast can be done, or None.
        profile: the one the server was started with.
        enabled: whether the server lets requests ask.
    """
    supported = shape is not None and refusal is None
    supers = profile.super_experts if profile is not None else ()
    references = profile.references if profile is not None else {}
    return {
        "supported": supported,
        "reason": refusal,
        "enabled": enabled,
        "layers": [*shape.layers] if shape else [],
        "experts_per_layer": shape.experts if shape else None,
        "top_k": shape.top_k if shape else None,
        "scoring": shape.scoring if shape else None,
        "renormalize": shape.renormalize if shape else None,
        "groups": shape.groups if shape else None,
        "topk_group": shape.topk_group if shape else None,
        "controls": _controls(shape, contrast_refusal, bool(references))
        if shape is not None and supported
        else {},
        "super_experts": [[*named] for named in supers],
        "references": {
            name: {"layers": [*held.layers], "width": held.width, "encoder": held.encoder}
            for name, held in references.items()
        },
        **profile_experts_listing(profile),
    }


def _controls(shape: ExpertShape, contrast_refusal: str | None, references: bool) -> dict[str, Any]:
    oea, xshare, lynx = controls.BUDGETS
    set_size = numbers({"experts": controls.budget_experts(shape)})
    return {
        "deactivate": listed(
            {"mode": choice(controls.DEACTIVATE_MODES, controls.DEACTIVATE_MODES[0])},
            controls.MOTE,
        ),
        "activate": listed(numbers({"weight": controls.WEIGHT}), controls.MOTE),
        "bias": listed(numbers({"value": controls.BIAS}), controls.MOTE),
        "top_k": listed(numbers({"top_k": controls.top_k(shape)}), controls.LEXI, per_layer=True),
        "top_p": listed({"top_p": number(0.0, 1.0, 1.0)}, controls.DYNAMIC_MOE, per_layer=False),
        "skip_ratio": listed(
            numbers({"skip_ratio": controls.SKIP_RATIO}), controls.NAEE, per_layer=True
        ),
        "budget": {
            oea.value: listed(numbers({"k0": controls.oea_k0(shape.top_k)}), controls.BUDGETS[oea]),
            **{
                method.value: listed(set_size, controls.BUDGETS[method])
                for method in (xshare, lynx)
            },
        },
        "remix": {method.value: _remix(method, shape, references) for method in RemixMethod},
        "contrast": listed(
            numbers(
                {
                    "weak_rank": controls.weak_rank(shape),
                    "beta": controls.BETA,
                    "alpha": controls.CONTRAST_ALPHA,
                }
            ),
            controls.SCMOE,
            contrast_refusal,
        ),
        "protect_super_experts": listed(
            {"protect_super_experts": choice((True, False), True)}, controls.SUPER_EXPERTS
        ),
    }


def _remix(method: RemixMethod, shape: ExpertShape, references: bool) -> dict[str, Any]:
    own: dict[str, Parameter] = {
        "alpha": controls.ALPHA,
        "top": controls.remix_top(shape, shape.top_k),
    }
    if method is not RemixMethod.SUPPLIED:
        own |= {"neighbors": controls.NEIGHBORS, "bandwidth": controls.BANDWIDTH}
    if method is RemixMethod.KERNEL:
        own["max_similarity"] = controls.MAX_SIMILARITY
    parameters = {
        "scope": choice([scope.value for scope in RemixScope], RemixScope.LAST.value),
        **numbers(own),
    }
    if method is RemixMethod.SUPPLIED:
        parameters["layers"] = choice(shape.layers, [*controls.remix_layers(shape)])
        return listed(parameters, controls.C3PO)
    parameters["kernel"] = choice(controls.REMIX_KERNELS, controls.REMIX_KERNELS[0])
    reason = None if references else "the server has no profile with re-mix references"
    return listed(parameters, controls.C3PO, reason)
