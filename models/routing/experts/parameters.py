"""Numbers that the expert controls take, and where each control is from.

Weights, biases and the like end in fp32, so their ranges stop well short of what it can hold.
"""

from __future__ import annotations

from sluice.models.depth.parameters import Number
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import (
    REMIX_ALPHA,
    REMIX_BANDWIDTH,
    REMIX_LAYERS,
    REMIX_MAX_SIMILARITY,
    REMIX_NEIGHBORS,
    REMIX_TOP,
    BudgetMethod,
)

MOTE = "MoTE (arXiv 2502.11096)"
LEXI = "LExI (arXiv 2509.02753)"
DYNAMIC_MOE = "Dynamic MoE (arXiv 2403.07652)"
NAEE = "NAEE (arXiv 2402.14800)"
C3PO = "C3PO (arXiv 2504.07964)"
SCMOE = "SCMoE (arXiv 2405.14507)"
SUPER_EXPERTS = "Super Experts (arXiv 2507.23279)"
BUDGETS = {
    BudgetMethod.OEA: "OEA (arXiv 2511.02237)",
    BudgetMethod.XSHARE: "XShare (arXiv 2602.07265)",
    BudgetMethod.LYNX: "Lynx (arXiv 2411.08982)",
}

LARGEST = 1e6
SMALLEST = 1e-6
"""Least weight of a forced expert, and least sum of a pathway's row."""

WEIGHT = Number(SMALLEST, LARGEST)
BIAS = Number(-LARGEST, LARGEST)
SKIP_RATIO = Number(0.0, 1.0)
ALPHA = Number(0.0, 1.0, REMIX_ALPHA)
NEIGHBORS = Number(1, 4096, REMIX_NEIGHBORS, integer=True)
BANDWIDTH = Number(1e-3, 1e3, REMIX_BANDWIDTH)
MAX_SIMILARITY = Number(0.0, 1.0, REMIX_MAX_SIMILARITY)
EMBEDDING = Number(-LARGEST, LARGEST)
PATHWAY = Number(0.0, LARGEST)
BETA = Number(0.0, LARGEST, 0.5)
CONTRAST_ALPHA = Number(0.0, 1.0, 0.1)
DEACTIVATE_MODES = ("mask", "drop")
REMIX_KERNELS = ("gaussian", "cosine")


def reachable(shape: ExpertShape) -> int:
    """Experts that one token can choose from: all of them, or those of its groups."""
    return shape.topk_group * (shape.experts // shape.groups)


def top_k(shape: ExpertShape) -> Number:
    """Range of `top_k`."""
    return Number(1, reachable(shape), shape.top_k, integer=True)


def weak_rank(shape: ExpertShape) -> Number:
    """Range of `contrast.weak_rank`."""
    return Number(0, reachable(shape) - 1, integer=True)


def budget_experts(shape: ExpertShape) -> Number:
    """Range of `budget.experts`."""
    return Number(1, shape.experts, integer=True)


def oea_k0(most: int) -> Number:
    """Range of `budget.k0` where a token has `most` experts."""
    return Number(1, most, integer=True)


def remix_top(shape: ExpertShape, most: int) -> Number:
    """Range of `remix.top` where a token has at most `most` experts."""
    return Number(most, shape.experts, max(most, min(REMIX_TOP, shape.experts)), integer=True)


def remix_layers(shape: ExpertShape) -> tuple[int, ...]:
    """Critical layers of a supplied pathway that names none."""
    return shape.layers[-REMIX_LAYERS:]
