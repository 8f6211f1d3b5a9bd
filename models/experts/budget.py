"""Batch budgets: the opted-in decode rows of a step share a set of experts in each layer.

The rule of each method is in `sluice.kernels.batch_budget`. What a row gets depends on the others:
only rows that asked for it take part, and requests with equal budgets share one set.
"""

from __future__ import annotations

import torch

from sluice.kernels.batch_budget import LYNX, OEA, XSHARE, batch_budget
from sluice.models.expert_policy import BudgetMethod, ExpertBudget

_METHODS = {BudgetMethod.OEA: OEA, BudgetMethod.XSHARE: XSHARE, BudgetMethod.LYNX: LYNX}


def shared_set(budget: ExpertBudget, choice: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts that the rows share.

    Args:
        budget: of all of them.
        choice: fp32, (rows, experts), selection scores.
        scores: fp32, (rows, experts), what weights are made of.

    Returns:
        bool, (experts,).
    """
    size = budget.k0 if budget.method is BudgetMethod.OEA else budget.experts
    assert size is not None
    return batch_budget(choice, scores, _METHODS[budget.method], size)
