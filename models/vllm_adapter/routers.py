"""Seam: `ExpertRouter` selects experts where vLLM's routers would.

Each layer's `MoERunner` has a router, whose `_compute_routing` turns logits into expert ids, before
any mapping to physical ones. An instance attribute replaces it. A kernel that routes by itself
calls no router, so a model with such layers is refused.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from sluice.kernels.ops.router_config import RouterConfig
from sluice.kernels.ops.routing_args import RouterSpec
from sluice.models.experts.router import ExpertRouter, Routed
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.vllm_adapter.decoder import DecoderStack
from sluice.models.vllm_adapter.patching import SeamMovedError

_HOOK = "_compute_routing"


class UnsupportedRouterError(ValueError):
    """The model routes in a way that the controls do not know; the message says how."""


def read_routers(stack: DecoderStack) -> tuple[ExpertShape, list[RouterSpec]]:
    """How the layers of a model route.

    Raises:
        UnsupportedRouterError: it has no routed experts, or they are chosen out of our reach.
        SeamMovedError: vLLM's routers are not where 0.32.0 has them.
    """
    runners = moe_runners(stack)
    if not runners:
        raise UnsupportedRouterError("the model has no routed experts")
    specs = [_spec(runner) for runner in runners.values()]
    layers = tuple(runners)
    shapes = {
        _shape(spec, runner, layers) for spec, runner in zip(specs, runners.values(), strict=True)
    }
    if len(shapes) > 1:
        raise UnsupportedRouterError("the model's layers do not all route alike")
    return shapes.pop(), specs


def attach(stack: DecoderStack, router: ExpertRouter) -> None:
    """Have `router` select in all layers with experts."""
    for moe_index, runner in enumerate(moe_runners(stack).values()):
        setattr(runner.router, _HOOK, _replaced(router, moe_index, getattr(runner.router, _HOOK)))


def _replaced(router: ExpertRouter, moe_index: int, stock: Any) -> Any:
    def compute(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Routed:
        if torch.compiler.is_compiling():
            # Only steps without controls run compiled; a graph must not depend on the step.
            compiled: Routed = stock(hidden_states, router_logits, *args, **kwargs)
            return compiled
        return router.route(
            moe_index, router_logits, lambda: stock(hidden_states, router_logits, *args, **kwargs)
        )

    return compute


def moe_runners(stack: DecoderStack) -> dict[int, Any]:
    """vLLM's `MoERunner` of each decoder layer that has one."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners: dict[int, Any] = {}
    for index, layer in enumerate(stack.layers):
        parts = [part for part in layer.mlp.modules() if isinstance(part, MoERunner)]
        if parts:
            (runners[index],) = parts
    return runners


def _spec(runner: Any) -> RouterSpec:
    router = runner.router
    if not hasattr(router, _HOOK):
        raise SeamMovedError(f"`{_HOOK}` on {type(router).__name__}")
    if runner.is_monolithic:
        raise UnsupportedRouterError(
            "the kernel of the experts chooses them itself: start with a modular MoE backend"
        )
    if getattr(router, "custom_routing_function", None) is not None:
        raise UnsupportedRouterError("the model has a routing function of its own")
    scoring = getattr(router, "scoring_func", "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise UnsupportedRouterError(f"experts are scored by {scoring}")
    correction = getattr(router, "e_score_correction_bias", None)
    # vLLM's own names differ between its routers: the CPU one says whether groups are used.
    grouped = getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group"))
    return RouterSpec(
        top_k=router.top_k,
        scoring=scoring,
        renormalize=router.renormalize,
        scale=getattr(router, "routed_scaling_factor", 1.0),
        groups=(router.num_expert_group or 1) if grouped else 1,
        topk_group=(router.topk_group or 1) if grouped else 1,
        correction=torch.empty(0) if correction is None else correction.detach().float(),
    )


def _shape(spec: RouterSpec, runner: Any, layers: tuple[int, ...]) -> ExpertShape:
    config = {each.name: getattr(spec, each.name) for each in fields(RouterConfig)}
    return ExpertShape(
        **config,
        layers=layers,
        experts=runner.router.global_num_experts,
        corrected=spec.correction.numel() > 0,
    )
