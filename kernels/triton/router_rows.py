"""Router logits of a block of rows to selection scores; what the routing kernels share.

Blocks are (rows, experts), experts padded to a power of two; the rules are those of
`sluice.kernels.ops.router_scores`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK = 1024
"""Numbers that a program holds at a time: rows times padded experts."""


def blocks(experts: int) -> tuple[int, int]:
    """Padded experts, and rows of a program."""
    block = triton.next_power_of_2(experts)
    return block, max(1, min(16, _BLOCK // block))


@triton.jit
def first_of(values: tl.tensor, experts: tl.tensor) -> tl.tensor:
    """Largest value of each row and where it is; of equals the first."""
    best = tl.max(values, axis=1)
    nowhere = values.shape[1]
    expert = tl.min(tl.where(values == best[:, None], experts[None, :], nowhere), axis=1)
    return best, expert


@triton.jit
def scored(logits: tl.tensor, inside: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    """Scores, fp32; 0 where there is no expert."""
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(inside, logits, float("-inf"))
        raised = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = raised / tl.sum(raised, axis=1)[:, None]
    return tl.where(inside, scores, 0.0)


@triton.jit
def scored_rows(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    rows: int,
    SIGMOID: tl.constexpr,
    EXPERTS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
) -> tl.tensor:
    """This program's rows, which of them exist, experts, which of them do, and scores."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < rows
    experts = tl.arange(0, E)
    inside = valid[:, None] & (experts < EXPERTS)[None, :]
    at = logits + row[:, None] * row_stride + experts[None, :] * column_stride
    scores = scored(tl.load(at, mask=inside, other=0.0).to(tl.float32), inside, SIGMOID)
    return row, valid, experts, inside, scores


@triton.jit
def remixed(
    scores: tl.tensor,
    experts: tl.tensor,
    inside: tl.tensor,
    remix_index: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    EXPERTS: tl.constexpr,
) -> tl.tensor:
    """Scores with the rows whose `remix_index` >= 0 pulled towards their reference."""
    has_reference = remix_index >= 0
    alpha = tl.load(alphas + remix_index, mask=has_reference, other=1.0)[:, None]
    top = tl.load(tops + remix_index, mask=has_reference, other=0)
    at = references + remix_index[:, None] * EXPERTS + experts[None, :]
    reference = tl.load(at, mask=has_reference[:, None] & inside, other=0.0)
    rest = tl.where(inside, scores, float("-inf"))
    part = tl.zeros_like(scores) > 0.0
    for rank in range(tl.minimum(tl.max(top, axis=0), EXPERTS)):
        _, expert = first_of(rest, experts)
        chosen = experts[None, :] == expert[:, None]
        part = part | (chosen & (rank < top)[:, None])
        rest = tl.where(chosen, float("-inf"), rest)
    mass = tl.sum(tl.where(part, scores, 0.0), axis=1)[:, None]
    weight = tl.sum(tl.where(part, reference, 0.0), axis=1)[:, None]
    # In this order: the reference may weigh so little that its inverse has no fp32.
    pulled = reference / tl.where(weight > 0.0, weight, 1.0) * mass
    return tl.where(part & (weight > 0.0), alpha * scores + (1.0 - alpha) * pulled, scores)


@triton.jit
def choices(
    scores: tl.tensor,
    correction: tl.tensor,
    bias: tl.tensor,
    forced: tl.tensor,
    experts: tl.tensor,
    inside: tl.tensor,
    CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> tl.tensor:
    """Selection scores: corrected, biased and limited to groups.

    Experts that are always selected have their own score here, and their group is in reach.
    """
    choice = scores
    if CORRECTED:
        choice = choice + correction
    choice = tl.where(inside, choice + bias, float("-inf"))
    if GROUPS > 1:
        SIZE: tl.constexpr = EXPERTS // GROUPS
        GROUP_BLOCK: tl.constexpr = triton.next_power_of_2(GROUPS)
        numbers = tl.arange(0, GROUP_BLOCK)
        group = experts // SIZE
        group_scores = tl.zeros([choice.shape[0], GROUP_BLOCK], dtype=tl.float32) - float("inf")
        for g in range(GROUPS):
            in_group = inside & (group == g)[None, :]
            values = tl.where(in_group, choice, float("-inf"))
            first, expert = first_of(values, experts)
            value = first
            # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
            if CORRECTED and SIZE > 1:
                others = tl.where(experts[None, :] == expert[:, None], float("-inf"), values)
                value = first + tl.max(others, axis=1)
            has_forced = tl.max((in_group & forced).to(tl.int32), axis=1) > 0
            value = tl.where(has_forced, float("inf"), value)
            group_scores = tl.where((numbers == g)[None, :], value[:, None], group_scores)
        reached = tl.zeros_like(choice) > 0.0
        left = (numbers < GROUPS)[None, :] & (group_scores == group_scores)
        for _ in range(TOPK_GROUP):
            # Groups out of reach are at -inf too: what was taken is told apart by `left`.
            best = tl.max(tl.where(left, group_scores, float("-inf")), axis=1)[:, None]
            candidates = tl.where(left & (group_scores == best), numbers[None, :], GROUP_BLOCK)
            chosen = tl.min(candidates, axis=1)
            reached = reached | (group[None, :] == chosen[:, None])
            left = left & (numbers[None, :] != chosen[:, None])
        choice = tl.where(reached, choice, float("-inf"))
    return choice
