"""How steps run where a test chooses: plans that no timing made, and launches as on CUDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.engine import Engine
from support.host_reads import no_host_reads

from sluice.models.engine.captured.decode import CapturedDecode, DecodeBuffers
from sluice.models.engine.captured.recorders import DirectCalls, Limits
from sluice.models.engine.cost_model import CostModel
from sluice.models.engine.plan import LayerPlanner
from sluice.models.engine.sublayers.static import StaticLayer

KEEP_ALL = CostModel(*(np.full(10, seconds) for seconds in (0.0, 1.0, 0.0, 1.0))).plan_layers
"""By costs under which no row that may stay is ever taken out."""


def plan_by(running: Engine, monkeypatch: pytest.MonkeyPatch, planner: LayerPlanner) -> None:
    """Have all steps of an engine planned by `planner`."""
    routed = running.runner.routed
    monkeypatch.setattr(routed.batch, "plan_layers", planner)
    monkeypatch.setattr(routed.batch, "_plans", {})
    monkeypatch.setattr(routed.loop, "_plan_layers", planner)


def planned_to_stay(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no row taken out of a layer of an engine that it may stay in."""
    plan_by(running, monkeypatch, KEEP_ALL)


def on_static_buffers(running: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have an engine on a CPU run its decode steps as one on CUDA does, with calls for graphs.

    Returns:
        The number of rows of each such step, as they run.
    """
    core, runner = running.runner.core, running.runner
    layers = [StaticLayer(layer) for layer in core.routed.stack.layers]
    model = runner.vllm_config.model_config
    buffers = DecodeBuffers.allocate(
        len(layers), 64, model.get_hidden_size(), model.dtype, runner.device
    )
    limits = Limits(seconds=float("inf"), memory=1)
    captured = CapturedDecode(layers, buffers, DirectCalls(), limits)
    monkeypatch.setattr(core.routed.loop, "captured", captured)
    gathered, sizes = core.run, []

    def run(step: Any, positions: Any, input_ids: Any, *others: Any) -> torch.Tensor:
        rows = len(step.requests.ids)
        if rows not in captured:
            assert captured.capture(rows)
        if not core.captures(step, rows):
            return gathered(step, positions, input_ids, *others)
        sizes.append(rows)
        return core.run_captured(step, positions, input_ids, rows)

    def launch(*which: Any) -> None:
        with no_host_reads():
            CapturedDecode.launch(captured, *which)

    monkeypatch.setattr(captured, "launch", launch)
    monkeypatch.setattr(core, "run", run)
    return sizes
