"""All steps of a calibration, in the order in which they run."""

from __future__ import annotations

from sluice.models.calibrate.behaviour import Behaviour
from sluice.models.calibrate.exits import Exits
from sluice.models.calibrate.expert_k import ExpertK
from sluice.models.calibrate.frontier import Frontier
from sluice.models.calibrate.heads import Heads
from sluice.models.calibrate.importance import Importance
from sluice.models.calibrate.references import References
from sluice.models.calibrate.routers import Routers
from sluice.models.calibrate.search import Search
from sluice.models.calibrate.skip_ratios import SkipRatios
from sluice.models.calibrate.step import Step
from sluice.models.calibrate.super_experts import SuperExperts

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
