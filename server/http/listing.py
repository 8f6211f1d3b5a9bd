"""Body of `GET /v1/routing/capabilities`: what this engine can be asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sluice.models.depth.method import AdaptiveMethod, DepthMethod, ExitMethod, StaticExit
from sluice.models.depth.parameters import Choice, Flag, LayerShares, Number
from sluice.models.depth.registry import adaptive_methods, offered_exits
from sluice.models.depth.skip_order import Unit
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import RemixMethod, RemixScope
from sluice.models.policy.policy import MissingKV, Phase
from sluice.models.profile.profile import Profile
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.experts import parameters as controls
from sluice.models.vllm_adapter.families import family_of


def capabilities_listing(capabilities: Capabilities) -> dict[str, Any]:
    """The whole body."""
    family = family_of(capabilities.architecture)
    supported = capabilities.refusal is None
    profile = capabilities.profile
    return {
        "object": "routing.capabilities",
        "model": capabilities.models[0],
        "architecture": capabilities.architecture,
        "family": family.name if family else None,
        "supported": supported,
        "reason": capabilities.refusal,
        "layers": capabilities.layers,
        "hidden_size": capabilities.hidden,
        "experts": capabilities.experts,
        "depth": depth_listing(capabilities) if supported else {},
        "effort": effort_listing(capabilities) if supported else {},
        "report": supported,
        "mode": capabilities.mode,
        "speed_warning": capabilities.speed_warning,
        "experts_routing": expert_listing(
            capabilities.expert_shape,
            capabilities.refusal or capabilities.expert_refusal,
            capabilities.contrast_refusal,
            profile,
            enabled=capabilities.expert_routing,
        ),
    }


def depth_listing(capabilities: Capabilities) -> dict[str, Any]:
    """The depth controls, with every method that a request may name."""
    return {
        "skip": {
            "units": ["blocks", "attention", "mlp"],
            "by": [unit.value for unit in Unit],
            "order": None if capabilities.importance is None else "profile",
            "order_reason": capabilities.order_refusal,
            "sets": skip_set_listing(capabilities.profile),
            "adapters": {
                name: adapter.model_dump(mode="json")
                for name, adapter in capabilities.adapters.items()
            },
        },
        "exit": {name: _exit(method, capabilities) for name, method in offered_exits().items()},
        "adaptive": {
            name: _adaptive(method, capabilities) for name, method in adaptive_methods().items()
        },
        "phase": [phase.value for phase in Phase],
    }


def _exit(method: ExitMethod | StaticExit, capabilities: Capabilities) -> dict[str, Any]:
    per_token = isinstance(method, ExitMethod)
    calibrated = capabilities.calibrated_exits(method.name)
    parameters, more = _parameters(method, capabilities)
    if calibrated:
        parameters["threshold"]["default"] = calibrated[0].threshold
    return listed(
        parameters,
        method.source,
        capabilities.missing_for(method),
        description=method.description,
        per_token=per_token,
        decay=isinstance(method, ExitMethod) and method.decays,
        sparing=isinstance(method, ExitMethod) and method.needs_logits,
        kv=[kv.value for kv in MissingKV] if per_token else [],
        calibrated=[entry.model_dump(mode="json", exclude={"method"}) for entry in calibrated],
        **more,
    )


def _adaptive(method: AdaptiveMethod, capabilities: Capabilities) -> dict[str, Any]:
    parameters, more = _parameters(method, capabilities)
    return listed(
        parameters,
        method.source,
        capabilities.missing_for(method),
        description=method.description,
        **more,
    )


def _parameters(
    method: DepthMethod, capabilities: Capabilities
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers that a method takes, and what stands beside `parameters`.

    A choice is listed under its plural, with its values; a flag says whether this engine can.
    """
    ranges: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        match parameter:
            case Number():
                ranges[name] = numbers({name: parameter})[name]
            case LayerShares():
                ranges[name] = number(0.0, 1.0, [*method.default_shares(capabilities.layers)])
            case Choice():
                more[f"{name}s"] = [*parameter.values]
            case Flag():
                more[name] = not (parameter.needs_whole_prompt and capabilities.chunked_prefill)
    return ranges, more


def effort_listing(capabilities: Capabilities) -> dict[str, Any]:
    """Where `effort` comes from and how low it goes.

    Returns:
        `available`, or the `reason` why not. `source` is `frontier`, or `importance` for the order
        in which blocks go; `lowest` is the effort of the last level, or that of a single block.
    """
    frontier = capabilities.profile.frontier if capabilities.profile is not None else None
    refusal = None if capabilities.effort_levels else capabilities.order_refusal
    common = {"available": refusal is None, "reason": refusal}
    if refusal is not None:
        return {**common, "source": None, "lowest": 1.0, "measure": None, "levels": []}
    if frontier is not None and frontier.effort:
        return {
            **common,
            "source": "frontier",
            "lowest": frontier.effort[-1].effort,
            "measure": frontier.measure,
            "levels": [level.model_dump(mode="json") for level in frontier.effort],
        }
    return {
        **common,
        "source": "importance",
        "lowest": 1.0 / capabilities.layers,
        "measure": None,
        "levels": [],
    }


def skip_set_listing(profile: Profile | None) -> dict[str, Any]:
    """Skip sets by name; `attention` and `mlp` go into `depth.skip` with phase `decode`."""
    sets = profile.fields.skip_sets if profile is not None else {}
    return {name: skip_set.model_dump(mode="json") for name, skip_set in sets.items()}


def profile_experts_listing(profile: Profile | None) -> dict[str, Any]:
    """Behaviours' experts, experts per layer (LExI) and skip ratios (NAEE)."""
    fields = profile.fields if profile is not None else None
    behaviours = fields.behaviours if fields is not None else {}
    levels = fields.expert_k if fields is not None else ()
    ratios = fields.skip_ratios if fields is not None else None
    return {
        "behaviours": {
            name: each.model_dump(mode="json", exclude_none=True)
            for name, each in behaviours.items()
        },
        "expert_k": [level.model_dump(mode="json", exclude_none=True) for level in levels],
        "skip_ratios": None if ratios is None else [*ratios],
    }


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
            name: {"layers": [*each.layers], "width": each.width, "encoder": each.encoder}
            for name, each in references.items()
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
    ranges: dict[str, Number] = {
        "alpha": controls.ALPHA,
        "top": controls.remix_top(shape, shape.top_k),
    }
    if method is not RemixMethod.SUPPLIED:
        ranges |= {"neighbors": controls.NEIGHBORS, "bandwidth": controls.BANDWIDTH}
    if method is RemixMethod.KERNEL:
        ranges["max_similarity"] = controls.MAX_SIMILARITY
    parameters = {
        "scope": choice([scope.value for scope in RemixScope], RemixScope.LAST.value),
        **numbers(ranges),
    }
    if method is RemixMethod.SUPPLIED:
        parameters["layers"] = choice(shape.layers, [*controls.remix_layers(shape)])
        return listed(parameters, controls.C3PO)
    parameters["kernel"] = choice(controls.REMIX_KERNELS, controls.REMIX_KERNELS[0])
    reason = None if references else "the server has no profile with re-mix references"
    return listed(parameters, controls.C3PO, reason)


def listed(
    parameters: dict[str, Any], source: str, reason: str | None = None, **more: Any
) -> dict[str, Any]:
    """A control: what it takes, the paper it is from, and why it is not available, or None."""
    return {
        "parameters": parameters,
        "source": source,
        "available": reason is None,
        "reason": reason,
        **more,
    }


def numbers(parameters: Mapping[str, Number]) -> dict[str, Any]:
    """Ranges and defaults by name."""
    return {
        name: number(p.low, p.high, p.default, integer=p.integer) for name, p in parameters.items()
    }


def number(low: float, high: float, default: Any, *, integer: bool = False) -> dict[str, Any]:
    """Range and default of one number, and whether it is a whole one."""
    return {"low": low, "high": high, "default": default, "integer": integer}


def choice(values: Sequence[Any], default: Any) -> dict[str, Any]:
    """What a field may be, and what it is if it is not given."""
    return {"choices": [*values], "default": default}
