"""All steps of a calibration, in the order in which they run."""

from __future__ import annotations

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
    Frontier,
)
