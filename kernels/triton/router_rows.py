"""Router logits of a block of rows to selection scores; what the routing kernels share.

Blocks are (rows, experts), experts padded to a power of two; the rules are those of
`sluice.kernels.ops.route_topk`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_of(values: tl.tensor, places: tl.tensor) -> tl.tensor:
    """Largest value of each row and its place; of equals the first."""
    best = tl.max(values, axis=1)
    nowhere = values.shape[1]
    place = tl.min(tl.where(values == best[:, None], places[None, :], nowhere), axis=1)
    return best, place


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
    live = row < rows
    places = tl.arange(0, E)
    inside = live[:, None] & (places < EXPERTS)[None, :]
    where = logits + row[:, None] * row_stride + places[None, :] * column_stride
    scores = scored(tl.load(where, mask=inside, other=0.0).to(tl.float32), inside, SIGMOID)
    return row, live, places, inside, scores


@triton.jit
def remixed(
    scores: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    pulls: tl.tensor,
    references: tl.tensor,
    alphas: tl.tensor,
    tops: tl.tensor,
    EXPERTS: tl.constexpr,
) -> tl.tensor:
    """Scores with the rows whose `pulls` >= 0 pulled towards their reference."""
    asks = pulls >= 0
    alpha = tl.load(alphas + pulls, mask=asks, other=1.0)[:, None]
    top = tl.load(tops + pulls, mask=asks, other=0)
    where = references + pulls[:, None] * EXPERTS + places[None, :]
    reference = tl.load(where, mask=asks[:, None] & inside, other=0.0)
    rest = tl.where(inside, scores, float("-inf"))
    part = tl.zeros_like(scores) > 0.0
    for rank in range(tl.minimum(tl.max(top, axis=0), EXPERTS)):
        _, place = first_of(rest, places)
        here = places[None, :] == place[:, None]
        part = part | (here & (rank < top)[:, None])
        rest = tl.where(here, float("-inf"), rest)
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
    places: tl.tensor,
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
        group = places // SIZE
        reach = tl.zeros([choice.shape[0], GROUP_BLOCK], dtype=tl.float32) - float("inf")
        for g in range(GROUPS):
            own = inside & (group == g)[None, :]
            values = tl.where(own, choice, float("-inf"))
            first, place = first_of(values, places)
            value = first
            # DeepSeek-V3 rates a group by its two best, DeepSeek-V2 by its best.
            if CORRECTED and SIZE > 1:
                others = tl.where(places[None, :] == place[:, None], float("-inf"), values)
                value = first + tl.max(others, axis=1)
            opened = tl.max((own & forced).to(tl.int32), axis=1) > 0
            value = tl.where(opened, float("inf"), value)
            reach = tl.where((numbers == g)[None, :], value[:, None], reach)
        within = tl.zeros_like(choice) > 0.0
        left = (numbers < GROUPS)[None, :] & (reach == reach)
        for _ in range(TOPK_GROUP):
            # Groups out of reach are at -inf too: what was taken is told apart by `left`.
            best = tl.max(tl.where(left, reach, float("-inf")), axis=1)[:, None]
            here = tl.where(left & (reach == best), numbers[None, :], GROUP_BLOCK)
            place = tl.min(here, axis=1)
            within = within | (group[None, :] == place[:, None])
            left = left & (numbers[None, :] != place[:, None])
        choice = tl.where(within, choice, float("-inf"))
    return choice
