"""All steps of a calibration, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sluice.models.offline.calibrate.depth.exits import Exits
from sluice.models.offline.calibrate.depth.heads import Heads
from sluice.models.offline.calibrate.depth.importance import Importance
from sluice.models.offline.calibrate.depth.routers import Routers
from sluice.models.offline.calibrate.experts.behaviour import Behaviour
from sluice.models.offline.calibrate.experts.expert_k import ExpertK
from sluice.models.offline.calibrate.experts.references import References
from sluice.models.offline.calibrate.experts.skip_ratios import SkipRatios
from sluice.models.offline.calibrate.experts.super_experts import SuperExperts
from sluice.models.offline.calibrate.frontier.frontier import Frontier
from sluice.models.offline.calibrate.frontier.search import Search
from sluice.models.offline.calibrate.recover.recover import Recover
from sluice.models.offline.calibrate.step import Step

STEPS: tuple[type[Step], ...] = (
    Importance,
    Heads,
    Routers,
    Exits,
    SuperExperts,
    Behaviour,
    ExpertK,
    SkipRatios,
    References,
    Search,
    Recover,
    Frontier,
)

QUICK: Mapping[str, Mapping[str, Any]] = {
    "importance": {"future_prompts": 1, "future_positions": 1},
    "frontier": {
        "items": 32,
        "prompts": 16,
        "timed": 8,
        "repeats": 6,
        "levels": 4,
        "deepest": 0.4,
        "samples": 8,
        "tried": 1,
        "least": 0.85,
        "draws": 0,
        "combined": 1,
    },
}
"""Steps of a quick calibration, with options that are not the defaults: the order in which layers
go, a few points and presets, in minutes."""

QUICK_PROMPTS, QUICK_NEW_TOKENS = 24, 16
"""Prompts that a quick calibration reads at most, and the longest answer."""
