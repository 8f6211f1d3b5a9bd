"""`batch_budget` in Triton; the rules are in `sluice.kernels.ops.batch_budget`."""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.batch_budget import LYNX, LYNX_LEVELS, LYNX_SCALE, OEA
from sluice.kernels.triton.router_rows import first_of

_SCALE = tl.constexpr(LYNX_SCALE)
_LEVELS = tl.constexpr(LYNX_LEVELS)


@triton.jit
def _share(
    choices: tl.tensor,
    scores: tl.tensor,
    members_out: tl.tensor,
    rows: int,
    size: int,
    IS_OEA: tl.constexpr,
    IS_LYNX: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
) -> None:
    """One program: decode rows are few, and a set is one for all of them."""
    experts = tl.arange(0, E)
    valid = experts < EXPERTS
    members = tl.zeros([E], dtype=tl.int32)
    reachable = tl.zeros([E], dtype=tl.int32)
    merit = tl.zeros([E], dtype=tl.float32)
    leading = 1
    if IS_OEA:
        leading = tl.minimum(size, EXPERTS)
    for start in range(0, rows, R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & valid[None, :]
        at = row[:, None].to(tl.int64) * EXPERTS + experts[None, :]
        choice = tl.load(choices + at, mask=inside, other=float("-inf"))
        in_reach = choice > float("-inf")
        reachable = tl.maximum(reachable, tl.max(in_reach.to(tl.int32), axis=0))
        if not IS_OEA:
            score = tl.where(in_reach, tl.load(scores + at, mask=inside, other=0.0), 0.0)
            votes = score
            if IS_LYNX:
                best = tl.max(score, axis=1)[:, None]
                bins = tl.floor((score - best) * _SCALE)
                votes = tl.exp2(tl.minimum(tl.maximum(bins, -_LEVELS), 0.0))
            merit += tl.sum(tl.where(in_reach, votes, 0.0), axis=0)
        for _ in range(leading):
            value, expert = first_of(choice, experts)
            chosen = experts[None, :] == expert[:, None]
            taken = chosen & (value > float("-inf"))[:, None]
            members = tl.maximum(members, tl.max(taken.to(tl.int32), axis=0))
            choice = tl.where(chosen, float("-inf"), choice)
    if not IS_OEA:
        # The best of every row are in whatever their merit; the rest by merit.
        rest = tl.where((members == 0) & (reachable > 0), merit, float("-inf"))
        for _ in range(size - tl.sum(members, axis=0)):
            best = tl.max(rest, axis=0)
            expert = tl.min(tl.where(rest == best, experts, E), axis=0)
            chosen = experts == expert
            members = tl.where(
                best > float("-inf"), tl.maximum(members, chosen.to(tl.int32)), members
            )
            rest = tl.where(chosen, float("-inf"), rest)
    tl.store(members_out + experts, members, mask=valid)


def batch_budget(
    choice: torch.Tensor, scores: torch.Tensor, method: int, size: int
) -> torch.Tensor:
    """See `sluice.kernels.ops.batch_budget.batch_budget`."""
    rows, experts = choice.shape
    members = torch.empty(experts, dtype=torch.bool, device=choice.device)
    block = triton.next_power_of_2(experts)
    _share[(1,)](
        choice.contiguous(),
        scores.contiguous(),
        members,
        rows,
        size,
        IS_OEA=method == OEA,
        IS_LYNX=method == LYNX,
        EXPERTS=experts,
        R=max(1, min(16, 1024 // block)),
        E=block,
    )
    return members
