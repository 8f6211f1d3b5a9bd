"""`batch_budget` on a CPU; the rules are in `sluice.kernels.ops.batch_budget`."""

from __future__ import annotations

import math

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import best_of
from sluice.kernels.ops.batch_budget import LYNX, LYNX_LEVELS, LYNX_SCALE, OEA


def batch_budget(
    choice: torch.Tensor, scores: torch.Tensor, method: int, size: int
) -> torch.Tensor:
    """See `sluice.kernels.ops.batch_budget.batch_budget`."""
    members = np.zeros(choice.shape[1], dtype=np.bool_)
    _share(choice.contiguous().numpy(), scores.contiguous().numpy(), method, size, members)
    return torch.from_numpy(members)


@compiled
def _share(choice: Array, scores: Array, method: int, size: int, members: Array) -> None:
    rows, experts = choice.shape
    k0 = min(size, experts) if method == OEA else 1
    ids = np.empty(experts, dtype=np.int64)
    keys = np.empty(experts, dtype=np.int64)
    merit = np.zeros(experts, dtype=np.float32)
    reachable = np.zeros(experts, dtype=np.bool_)
    for r in range(rows):
        best_of(choice[r], experts, k0, ids, keys)
        for slot in range(k0):
            if choice[r, ids[slot]] > -np.inf:
                members[ids[slot]] = True
        best = np.float32(0.0)
        for e in range(experts):
            if choice[r, e] > -np.inf:
                best = max(best, scores[r, e])
        for e in range(experts):
            if not choice[r, e] > -np.inf:
                continue
            reachable[e] = True
            if method == LYNX:
                below = math.floor(LYNX_SCALE * (scores[r, e] - best))
                merit[e] += 2.0 ** max(-LYNX_LEVELS, min(0.0, below))
            else:
                merit[e] += scores[r, e]
    if method == OEA:
        return
    free = 0
    for e in range(experts):
        free += not members[e] and reachable[e]
        if members[e] or not reachable[e]:
            merit[e] = -np.inf
    # The best of every row are in whatever their merit; the rest by merit.
    more = min(size - members.sum(), free)
    if more > 0:
        best_of(merit, experts, more, ids, keys)
        for slot in range(more):
            members[ids[slot]] = True
