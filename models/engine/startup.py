"""Seam: the cost model is measured on vLLM's layers, and all ranks take the first one's."""

from __future__ import annotations

from typing import Any

import torch

from sluice.kernels.ops.batch_budget import OEA, batch_budget
from sluice.kernels.ops.exit_decision import CONFIDENCE, exit_decision
from sluice.kernels.ops.layer_stats import layer_stats
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_scores import router_scores
from sluice.kernels.ops.routing_args import RouteRows, RouterSpec, Shared
from sluice.models.engine.cost_model import CostModel
from sluice.models.experts.policy_table import ExpertTable
from sluice.models.experts.routing_counts import RoutingCounts
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.vllm_adapter.decoder import DecoderStack


def measured_cost(runner: Any, stack: DecoderStack) -> CostModel:
    """Time the loaded model's layers.

    Args:
        runner: vLLM's model runner.
        stack: its model's layers.
    """
    from vllm.distributed import get_tp_group
    from vllm.forward_context import set_forward_context

    config = runner.model_config
    with torch.inference_mode(), set_forward_context(None, runner.vllm_config):
        cost = CostModel.measure(stack, config.get_hidden_size(), config.dtype)
    # Ranks that planned a layer differently would wait for each other in its all-reduce.
    group = get_tp_group()
    table = torch.from_numpy(cost.to_array()).to(runner.device)
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
    correction = spec.corrections.to(device)
    logits = torch.zeros((1, shape.experts), device=device)
    repeat = device.type == "cpu"
    _, ids = route_topk(
        logits, [], rows, shared, table, counts, correction, 0, *spec.numbers, spec.top_k, repeat
    )
    count_selections(ids, rows.owners, counts, 0)
    numbers = spec.score_numbers
    scores, choice = router_scores(logits, rows, shared, table, correction, *numbers)
    batch_budget(choice, scores, OEA, 1)
