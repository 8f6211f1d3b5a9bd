"""Seam: the cost model is measured on vLLM's layers, and all ranks take the first one's."""

from __future__ import annotations

from typing import Any

import torch

from sluice.models.cost_model import CostModel
from sluice.models.stack import DecoderStack


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
    # Ranks that arranged a layer differently would wait for each other in its all-reduce.
    group = get_tp_group()
    table = torch.from_numpy(cost.to_array()).to(runner.device)
    if group.world_size > 1:
        table = group.broadcast(table, src=0)
    return CostModel.from_array(table.cpu().numpy())
