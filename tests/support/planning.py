"""Plans that a test chooses, in place of those that a CPU's timings make."""

from __future__ import annotations

import numpy as np
import pytest
from support.engine import Engine

from sluice.models.engine.cost_model import CostModel
from sluice.models.engine.plan import LayerPlanner

KEEP_ALL = CostModel(*(np.full(10, seconds) for seconds in (0.0, 1.0, 0.0, 1.0))).plan_layers
"""By costs under which no row that may stay is ever taken out."""


def plan_by(running: Engine, monkeypatch: pytest.MonkeyPatch, planner: LayerPlanner) -> None:
    """Have all steps of an engine planned by `planner`."""
    routed = running.runner.routed
    monkeypatch.setattr(routed.batch, "plan_layers", planner)
    monkeypatch.setattr(routed.batch, "_plans", {})
    monkeypatch.setattr(routed.loop, "_plan_layers", planner)
