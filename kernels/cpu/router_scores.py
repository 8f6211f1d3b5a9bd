"""`router_scores` on a CPU: one pass per row, in machine code."""

from __future__ import annotations

import numpy as np
import torch

from sluice.kernels.cpu.jit import Array, compiled
from sluice.kernels.cpu.router_rows import choice_row, fp32_array, remix_row, score_row
from sluice.kernels.ops.routing_args import PolicyTable, RouteRows, RouterSpec, Shared


def router_scores(
    logits: torch.Tensor, rows: RouteRows, shared: Shared, table: PolicyTable, router: RouterSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.router_scores.router_scores`."""
    scores = np.empty(logits.shape, dtype=np.float32)
    choice = np.empty(logits.shape, dtype=np.float32)
    asked, targets, policies = rows.arrays, shared.arrays, table.arrays
    _scores(
        fp32_array(logits),
        asked.policy_index,
        asked.remix_index,
        targets.references,
        targets.alpha,
        targets.top,
        policies.bias,
        policies.marks,
        router.correction_array,
        router.sigmoid,
        router.groups,
        router.topk_group,
        scores,
        choice,
    )
    return torch.from_numpy(scores), torch.from_numpy(choice)


@compiled
def _scores(
    logits: Array,
    policy_index: Array,
    remix_index: Array,
    references: Array,
    alpha: Array,
    top: Array,
    bias: Array,
    marks: Array,
    correction: Array,
    sigmoid: bool,
    groups: int,
    topk_group: int,
    scores: Array,
    choice: Array,
) -> None:
    """Write `scores` and `choice`."""
    rows, experts = logits.shape
    order = np.empty(experts, dtype=np.int64)
    keys = np.empty(experts, dtype=np.int64)
    group_scores = np.empty(groups, dtype=np.float32)
    for r in range(rows):
        p = policy_index[r]
        score_row(logits[r], sigmoid, scores[r])
        if len(remix_index) and remix_index[r] >= 0:
            remix = remix_index[r]
            remix_row(scores[r], references[remix], alpha[remix], top[remix], order, keys)
        choice_row(
            scores[r],
            correction,
            bias[p],
            marks[p],
            groups,
            topk_group,
            order,
            keys,
            group_scores,
            choice[r],
        )
