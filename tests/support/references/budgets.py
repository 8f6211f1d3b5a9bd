"""The experts that decode rows of a step share, written from the papers.

Sources: OEA (arXiv 2511.02237), XShare (arXiv 2602.07265), Lynx (arXiv 2411.08982).

`scores` are what the routers made of the rows, `choices` what the rows select by; both hold a
row per token and a number per expert. An expert that a row cannot select is minus infinity in
its choices, and the row has no say in it. Ties go to the lower expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sluice.models.policy.experts import BudgetMethod, ExpertBudget

from .routes import GONE, ordered

Rows = Sequence[Sequence[float]]


def shared_experts(budget: ExpertBudget, scores: Rows, choices: Rows) -> frozenset[int]:
    """The set that the rows agree on."""
    if budget.method is BudgetMethod.OEA:
        assert budget.k0 is not None
        return oea(choices, budget.k0)
    assert budget.experts is not None
    fill = {BudgetMethod.XSHARE: xshare, BudgetMethod.LYNX: lynx}[budget.method]
    return fill(scores, choices, budget.experts)


def oea(choices: Rows, k0: int) -> frozenset[int]:
    """Every row's `k0` best."""
    shared: set[int] = set()
    for choice in choices:
        shared |= set(ordered(choice)[:k0])
    return frozenset(shared)


def xshare(scores: Rows, choices: Rows, experts: int) -> frozenset[int]:
    """Every row's best, then those with the largest sum of scores."""
    utility = dict.fromkeys(_eligible(choices), 0.0)
    for score, choice in zip(scores, choices, strict=True):
        for expert in ordered(choice):
            utility[expert] += score[expert]
    return _filled(oea(choices, 1), utility, experts)


def lynx(scores: Rows, choices: Rows, experts: int) -> frozenset[int]:
    """Every row's best, then those with most votes; a vote halves with each bin below the best."""
    votes = dict.fromkeys(_eligible(choices), 0.0)
    for score, choice in zip(scores, choices, strict=True):
        alive = ordered(choice)
        best = max((score[expert] for expert in alive), default=0.0)
        for expert in alive:
            below = math.floor(8.0 * (score[expert] - best))
            votes[expert] += 2.0 ** max(-5, min(0, below))
    return _filled(oea(choices, 1), votes, experts)


def _eligible(choices: Rows) -> list[int]:
    return sorted({expert for choice in choices for expert, c in enumerate(choice) if c > GONE})


def _filled(start: frozenset[int], worth: dict[int, float], experts: int) -> frozenset[int]:
    shared = set(start)
    for expert in sorted(worth, key=lambda expert: (-worth[expert], expert)):
        if len(shared) >= experts:
            break
        shared.add(expert)
    return frozenset(shared)
