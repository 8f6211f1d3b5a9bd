"""Start-up of an engine: what routes requests is built around a model that vLLM has just loaded.

The cost model is measured on the model's own layers, all operations run once so that they are
compiled before the first request, and our router is put before vLLM's.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sluice.kernels.ops.batch_budget import OEA, batch_budget
from sluice.kernels.ops.exit_decision import CONFIDENCE, exit_decision
from sluice.kernels.ops.layer_stats import layer_stats
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_scores import router_scores
from sluice.kernels.ops.routing_args import RouteRows, RouterSpec, Selection, Shared
from sluice.models.engine.batch import Batch
from sluice.models.engine.cost_model import CostModel
from sluice.models.engine.loop import LayerLoop
from sluice.models.engine.recorder import Recorder
from sluice.models.engine.sublayers.compiled import Compiler
from sluice.models.engine.sublayers.graphs import examples
from sluice.models.engine.sublayers.sublayers import SubLayers, compiled_sublayers, plain_sublayers
from sluice.models.experts.batch import BatchExperts
from sluice.models.experts.policy_table import ExpertTable
from sluice.models.experts.router import ExpertRouter
from sluice.models.experts.routing_counts import RoutingCounts
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.profile.profile import Profile
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.vllm_adapter.compilation import experts_as_operations, inductor_options
from sluice.models.vllm_adapter.decoder import DecoderStack
from sluice.models.vllm_adapter.families import family_of
from sluice.models.vllm_adapter.logits import KnownLogits
from sluice.models.vllm_adapter.routers import UnsupportedRouterError, attach, read_routers

SEGMENTS_ENV = "SLUICE_SEGMENTS"
"""Environment variable that is `off` to run layers uncompiled and in no graph, for a comparison."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A loaded model, and what routes its requests.

    Attributes:
        stack: the model's layers.
        cost: of these layers.
        batch: the requests that have a policy.
        loop: runs their steps.
        recorder: notes what ran.
        known_logits: gives the LM head logits that are known.
        router: selects experts in place of the model's routers, or None without expert controls.
        expert_shape: of the routed experts, or None without expert controls.
        expert_refusal: why there are no expert controls, or None.
    """

    stack: DecoderStack
    cost: ModuleCost
    batch: Batch
    loop: LayerLoop
    recorder: Recorder
    known_logits: KnownLogits
    router: ExpertRouter | None
    expert_shape: ExpertShape | None
    expert_refusal: str | None

    @classmethod
    def build(
        cls,
        model: nn.Module,
        vllm_config: Any,
        device: torch.device,
        profile: Profile | None,
    ) -> RoutedModel:
        """Build it around a loaded model.

        Args:
            model: as vLLM loaded it, of a family that the loop can drive.
            vllm_config: vLLM's `VllmConfig`.
            device: that the model is on.
            profile: of the model.
        """
        config = vllm_config.model_config
        family = family_of(config.architecture)
        assert family is not None
        stack = DecoderStack.from_model(model, family)
        # After the stack, which keeps the model's own LM head for the exit tests.
        known_logits = KnownLogits(model)
        warm_up_exits(config.get_hidden_size(), config.dtype, device)
        sublayers = build_sublayers(stack, vllm_config, device)
        # So that exit tests read what the LM head reads.
        stack = replace(stack, final_norm=sublayers.final_norm)
        plan_layers = measured_cost(stack, sublayers, vllm_config, device).plan_layers
        cost = stack.cost(
            experts_per_token=getattr(config.hf_text_config, "num_experts_per_tok", 0) or 0,
            experts=config.get_num_experts() if family.moe else 0,
        )
        shape, refusal, router, experts = None, None, None, None
        try:
            shape, specs = read_routers(stack)
        except UnsupportedRouterError as error:
            refusal = str(error)
        else:
            router = ExpertRouter(specs, shape, device)
            attach(stack, router)
            warm_up_routers(specs[0], shape, device)
            experts = BatchExperts(shape, profile, device)
        block_size = vllm_config.cache_config.block_size
        batch = Batch(
            len(stack.layers),
            block_size,
            profile,
            device,
            plan_layers,
            experts,
            cost.worth_of_leaving(),
        )
        return cls(
            stack=stack,
            cost=cost,
            batch=batch,
            loop=LayerLoop(stack, sublayers, plan_layers, router),
            recorder=Recorder(batch.table, router),
            known_logits=known_logits,
            router=router,
            expert_shape=shape,
            expert_refusal=refusal,
        )


def build_sublayers(stack: DecoderStack, vllm_config: Any, device: torch.device) -> SubLayers:
    """The parts of the layers, compiled where vLLM compiles the model.

    Args:
        stack: the model's layers.
        vllm_config: vLLM's `VllmConfig`.
        device: that the model is on.
    """
    options = inductor_options(vllm_config)
    if options is None or os.environ.get(SEGMENTS_ENV) == "off":
        return plain_sublayers(stack)
    config = vllm_config.model_config
    began, peak = time.perf_counter(), _peak_memory()
    arguments = examples(config.get_hidden_size(), config.dtype, device)
    sublayers = traced_sublayers(stack, vllm_config, Compiler(options, arguments))
    seconds, more = time.perf_counter() - began, _peak_memory() - peak
    _LOG.info(
        "compiled the parts of %d layers in %.0f s, and took %.0f MiB more at the most",
        len(stack.layers),
        seconds,
        more,
    )
    return sublayers


def _peak_memory() -> float:
    """Most memory that this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def traced_sublayers(stack: DecoderStack, vllm_config: Any, compiler: Compiler) -> SubLayers:
    """The parts of the layers, traced as in a step of vLLM's.

    Args:
        stack: the model's layers.
        vllm_config: vLLM's `VllmConfig`.
        compiler: of the graphs.
    """
    from vllm.forward_context import set_forward_context

    with (
        torch.inference_mode(),
        set_forward_context(None, vllm_config),
        experts_as_operations(stack),
    ):
        return compiled_sublayers(stack, compiler)


def measured_cost(
    stack: DecoderStack, sublayers: SubLayers, vllm_config: Any, device: torch.device
) -> CostModel:
    """Time the loaded model's layers.

    Args:
        stack: the layers.
        sublayers: run their parts.
        vllm_config: vLLM's `VllmConfig`.
        device: that they are on.
    """
    from vllm.distributed import get_tp_group
    from vllm.forward_context import set_forward_context

    config = vllm_config.model_config
    with torch.inference_mode(), set_forward_context(None, vllm_config):
        cost = CostModel.measure(stack, sublayers, config.get_hidden_size(), config.dtype)
    # Ranks that planned a layer differently would wait for each other in its all-reduce.
    group = get_tp_group()
    table = torch.from_numpy(cost.to_array()).to(device)
    if group.world_size > 1:
        table = group.broadcast(table, src=0)
    return CostModel.from_array(table.cpu().numpy())


def warm_up_exits(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """Test one row, so that the operations are compiled for a model.

    Args:
        hidden: size of its residual stream.
        dtype: of its states and logits.
        device: where it runs.
    """
    row = torch.zeros((1, hidden), dtype=dtype, device=device)
    layer_stats(row, row.new_empty(0), row)
    exit_decision(row, torch.zeros(1, device=device), CONFIDENCE)


def warm_up_routers(spec: RouterSpec, shape: ExpertShape, device: torch.device) -> None:
    """Route one row, so that the operations are compiled for a model.

    Args:
        spec: of one of its layers.
        shape: of its experts.
        device: where it runs.
    """
    table = ExpertTable(shape, (), device).layer(0)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    rows = RouteRows(one, one.long(), one[:0], one[:0])
    shared = Shared.nothing(shape.experts, device)
    counts = RoutingCounts(1, len(shape.layers), shape.experts, device).tensors
    router, stock = spec.to(device), Selection.nothing(device)
    logits = torch.zeros((1, shape.experts), device=device)
    repeat = device.type == "cpu"
    _, ids = route_topk(logits, rows, shared, table, router, stock, counts, 0, router.top_k, repeat)
    count_selections(ids, rows.token_index, counts, 0)
    scores, choice = router_scores(logits, rows, shared, table, router)
    batch_budget(choice, scores, OEA, 1)
