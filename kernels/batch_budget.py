"""A set of experts that the rows of a batch share: OEA, XShare, Lynx.

Plain PyTorch; also the CPU path. Sources: OEA (2511.02237), XShare (2602.07265), Lynx
(2411.08982). Entries of `choice` at -inf are out of their row's reach.
"""

from __future__ import annotations

import torch

_LYNX_SCALE = 8.0
_LYNX_LEVELS = 5.0
"""Lynx bins score differences; the paper's constants depend on k / experts by a formula that we
did not find, so one pair of constants stands for it (k / experts of 1/8 has 5 levels there)."""


def oea_set(choice: torch.Tensor, k0: int) -> torch.Tensor:
    """Union of every row's `k0` best.

    Args:
        choice: fp32, (rows, experts), selection scores.
        k0: leading choices of a row.

    Returns:
        bool, (experts,).
    """
    values, ids = choice.topk(min(k0, choice.shape[1]), dim=-1)
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
    out = choice == float("-inf")
    best = scores.masked_fill(out, 0.0).amax(-1, keepdim=True)
    bins = (_LYNX_SCALE * (scores - best)).floor().clamp(-_LYNX_LEVELS, 0.0)
    votes = bins.exp2().masked_fill(out, 0.0).sum(0)
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
