"""A set of experts that the rows of a batch share: OEA, XShare, Lynx.

Sources: OEA (arXiv 2511.02237), XShare (arXiv 2602.07265), Lynx (arXiv 2411.08982). Entries of
`choice` at -inf are out of their row's reach.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation
from sluice.kernels.ops.router_scores import best

OEA, XSHARE, LYNX = range(3)
"""Methods."""

LYNX_SCALE = 8.0
LYNX_LEVELS = 5.0
"""Lynx bins score differences; the paper's constants depend on k / experts by a formula that we
did not find, so one pair of constants stands for it (k / experts of 1/8 has 5 levels there)."""


def _fake(choice: torch.Tensor, scores: torch.Tensor, method: int, size: int) -> torch.Tensor:
    return choice.new_empty(choice.shape[1], dtype=torch.bool)


@operation(
    fake=_fake,
    cpu="sluice.kernels.cpu.batch_budget:batch_budget",
    triton="sluice.kernels.triton.batch_budget:batch_budget",
)
def batch_budget(
    choice: torch.Tensor, scores: torch.Tensor, method: int, size: int
) -> torch.Tensor:
    """The experts that rows share.

    Args:
        choice: fp32, (rows, experts), selection scores.
        scores: fp32, (rows, experts), what weights are made of.
        method: `OEA`, `XSHARE` or `LYNX`.
        size: leading choices of a row for OEA, else experts in the set.

    Returns:
        bool, (experts,).
    """
    if method == OEA:
        return oea_set(choice, size)
    return (xshare_set if method == XSHARE else lynx_set)(choice, scores, size)


def oea_set(choice: torch.Tensor, k0: int) -> torch.Tensor:
    """Union of every row's `k0` best.

    Args:
        choice: fp32, (rows, experts), selection scores.
        k0: leading choices of a row.

    Returns:
        bool, (experts,).
    """
    values, ids = best(choice, k0)
    return _members(choice, ids[values > float("-inf")])


def xshare_set(choice: torch.Tensor, scores: torch.Tensor, experts: int) -> torch.Tensor:
    """Every row's best, then the experts with the largest summed score, `experts` in all.

    Args:
        choice: fp32, (rows, experts), selection scores.
        scores: fp32, (rows, experts), what weights are made of.
        experts: size of the set; the rows' best are in it even if they are more.

    Returns:
        bool, (experts,).
    """
    utility = scores.masked_fill(choice == float("-inf"), 0.0).sum(0)
    return _filled(choice, utility, experts)


def lynx_set(choice: torch.Tensor, scores: torch.Tensor, experts: int) -> torch.Tensor:
    """Every row's best, then the experts with the most binned votes, `experts` in all.

    Arguments and result as in `xshare_set`; a vote is 2 to the power of the binned distance
    between the expert's score and that of the row's best.
    """
    unreachable = choice == float("-inf")
    best = scores.masked_fill(unreachable, 0.0).amax(-1, keepdim=True)
    bins = (LYNX_SCALE * (scores - best)).floor().clamp(-LYNX_LEVELS, 0.0)
    votes = bins.exp2().masked_fill(unreachable, 0.0).sum(0)
    return _filled(choice, votes, experts)


def _filled(choice: torch.Tensor, merit: torch.Tensor, experts: int) -> torch.Tensor:
    members = _members(choice, choice.argmax(-1))
    reachable = (choice > float("-inf")).any(0)
    merit = merit.masked_fill(~reachable, float("-inf"))
    # The best of every row come first, whatever their merit; the rest by merit.
    ranked = merit.masked_fill(members, float("inf")).sort(descending=True, stable=True).indices
    size = torch.clamp(members.sum(), min=experts)
    inside = torch.arange(len(merit), device=merit.device) < size
    return torch.zeros_like(members).scatter_(0, ranked, inside) & reachable


def _members(choice: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    members = torch.zeros(choice.shape[1], dtype=torch.bool, device=choice.device)
    members[ids.flatten()] = True
    return members
