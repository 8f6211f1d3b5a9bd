"""`router_scores` in Triton; the rules are those of `sluice.kernels.ops.router_scores`."""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.routing_args import FORCED, PolicyTable, RouteRows, RouterSpec, Shared
from sluice.kernels.triton.router_rows import blocks, choices, remixed, scored_rows

_FORCED = tl.constexpr(FORCED)


@triton.jit
def _score(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    policy_index: tl.tensor,
    remix_index: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    biases: tl.tensor,
    marks: tl.tensor,
    corrections: tl.tensor,
    scores_out: tl.tensor,
    choice_out: tl.tensor,
    rows: int,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    HAS_REMIX: tl.constexpr,
    CORRECTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
) -> None:
    row, valid, experts, inside, scores = scored_rows(
        logits, row_stride, column_stride, rows, SIGMOID, EXPERTS, R, E
    )
    policy = tl.load(policy_index + row, mask=valid, other=0)
    at_policy = policy[:, None] * EXPERTS + experts[None, :]
    bias = tl.load(biases + at_policy, mask=inside, other=0.0)
    forced = (tl.load(marks + at_policy, mask=inside, other=0).to(tl.int32) & _FORCED) != 0
    correction = tl.zeros_like(scores)
    if HAS_REMIX:
        remix = tl.load(remix_index + row, mask=valid, other=-1)
        scores = remixed(scores, experts, inside, remix, references, alphas, tops, EXPERTS)
    if CORRECTED:
        correction += tl.load(corrections + experts, mask=experts < EXPERTS, other=0.0)[None, :]
    choice = choices(
        scores, correction, bias, forced, experts, inside, CORRECTED, GROUPS, TOPK_GROUP, EXPERTS
    )
    at = row[:, None] * EXPERTS + experts[None, :]
    tl.store(scores_out + at, scores, mask=inside)
    tl.store(choice_out + at, choice, mask=inside)


def router_scores(
    logits: torch.Tensor, rows: RouteRows, shared: Shared, table: PolicyTable, router: RouterSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.router_scores.router_scores`."""
    count, experts = logits.shape
    scores = torch.empty((count, experts), dtype=torch.float32, device=logits.device)
    choice = torch.empty_like(scores)
    block, per_program = blocks(experts)
    _score[(triton.cdiv(count, per_program),)](
        logits,
        *logits.stride(),
        rows.policy_index,
        rows.remix_index,
        shared.references,
        shared.alpha,
        shared.top,
        table.bias,
        table.marks,
        router.correction,
        scores,
        choice,
        count,
        SIGMOID=router.sigmoid,
        GROUPS=router.groups,
        TOPK_GROUP=router.topk_group,
        HAS_REMIX=rows.remix_index.numel() > 0,
        CORRECTED=router.correction.numel() > 0,
        EXPERTS=experts,
        R=per_program,
        E=block,
    )
    return scores, choice
