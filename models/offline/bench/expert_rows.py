"""What is measured on the mixture of experts."""

from __future__ import annotations

from sluice.models.offline.bench.model import TOP_K, BenchModel
from sluice.models.offline.bench.rows import Row
from sluice.models.policy.experts import BudgetMethod, ExpertBudget, ExpertPolicy
from sluice.models.policy.policy import RoutingPolicy

BATCHES = (1, 8, 16, 32)
NEUTRAL = RoutingPolicy(experts=ExpertPolicy(top_p=0.9999999))
"""Runs everything that a control runs and takes no expert away."""

NEUTRAL_NAME = "a control that takes nothing away"
HALF_NAME = f"top_k {TOP_K} to {TOP_K // 2}"
OEA_NAME = f"OEA, k0 {TOP_K // 2}"
"""What the tables call them."""

HALF = RoutingPolicy(experts=ExpertPolicy(top_k=TOP_K // 2))
OEA = RoutingPolicy(experts=ExpertPolicy(budget=ExpertBudget(BudgetMethod.OEA, k0=TOP_K // 2)))
_XSHARE = ExpertPolicy(budget=ExpertBudget(BudgetMethod.XSHARE, experts=16))


def expert_rows() -> tuple[Row, ...]:
    """One row per control and batch."""
    asked: tuple[tuple[str, RoutingPolicy | None, float | None], ...] = (
        ("no routing", None, 0.98),
        (NEUTRAL_NAME, NEUTRAL, 0.97),
        (HALF_NAME, HALF, None),
        (OEA_NAME, OEA, None),
        ("XShare, 16 of 64 experts", RoutingPolicy(experts=_XSHARE), None),
    )
    return tuple(
        Row(
            f"experts, batch {batch}, {name}",
            (policy,) * batch,
            bar,
            1.0 if bar is not None else None,
            model=BenchModel.MOE,
        )
        for name, policy, bar in asked
        for batch in BATCHES
    )
