"""Batch budgets: the opted-in decode rows of a step share a set of experts in each layer.

The rule of each method is in `sluice.kernels.batch_budget`. What a row gets depends on the others:
only rows that asked for it take part, and requests with equal budgets share one set.
"""

from __future__ import annotations

import torch

from sluice.kernels.batch_budget import lynx_set, oea_set, xshare_set
from sluice.models.expert_policy import BudgetMethod, ExpertBudget


def shared_set(budget: ExpertBudget, choice: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Experts that the rows share.

    Args:
        budget: of all of them.
        choice: fp32, (rows, experts), selection scores.
        scores: fp32, (rows, experts), what weights are made of.

    Returns:
        bool, (experts,).
    """
    if budget.method is BudgetMethod.OEA:
        assert budget.k0 is not None
        return oea_set(choice, budget.k0)
    assert budget.experts is not None
    chosen = xshare_set if budget.method is BudgetMethod.XSHARE else lynx_set
    return chosen(choice, scores, budget.experts)
