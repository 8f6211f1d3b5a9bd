"""`exit_decision` in Triton; rules and arguments are in `sluice.kernels.ops.exit_decision`.

A program reads one part of the vocabulary for some rows, so that a few rows keep the whole device
busy. Each of its lanes keeps the state of the tokens it has seen: the two largest logits, and,
relative to the largest, the sum of the raised logits and the sum of these times their logarithm.
States are joined at the end of a part, and those of the parts by a second kernel.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl
from sluice.kernels.ops.exit_decision import CONFIDENCE, NOTHING

_NOTHING = tl.constexpr(NOTHING)
"""Also in the place of NaN, which a maximum drops: the difference of two -inf."""
_LANES = 1024
_PART = 4096
"""Tokens of a part."""


@triton.jit
def _joined(
    first: tl.tensor, second: tl.tensor, total: tl.tensor, weighted: tl.tensor, lanes: tl.tensor
) -> tl.tensor:
    """One state a row, (rows,) each, from those of the lanes, (rows, lanes)."""
    best = tl.max(first, axis=1)
    lane = tl.min(tl.where(first == best[:, None], lanes[None, :], first.shape[1]), axis=1)
    others = tl.where(lanes[None, :] == lane[:, None], float("-inf"), first)
    runner_up = tl.maximum(tl.max(others, axis=1), tl.max(second, axis=1))
    below = tl.maximum(first - best[:, None], _NOTHING)
    # 0 for lanes without a token; times the NaN of a broken one, still NaN.
    share = tl.exp(below)
    return (
        best,
        runner_up,
        tl.sum(share * total, axis=1),
        tl.sum(share * (weighted + below * total), axis=1),
    )


@triton.jit
def _decide(
    row: tl.tensor,
    valid: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    thresholds: tl.tensor,
    stats: tl.tensor,
    decisions: tl.tensor,
    CONFIDENT: tl.constexpr,
) -> None:
    spread = tl.log(total)
    entropy = spread - weighted / total
    threshold = tl.load(thresholds + row, mask=valid, other=0.0)
    if CONFIDENT:
        leaves = (1.0 - tl.exp(second - first)) / total >= threshold
    else:
        leaves = entropy <= threshold
    whole = total == total
    tl.store(stats + row * 4, tl.where(whole, first, float("nan")), mask=valid)
    tl.store(stats + row * 4 + 1, tl.where(whole, second, float("nan")), mask=valid)
    tl.store(stats + row * 4 + 2, first + spread, mask=valid)
    tl.store(stats + row * 4 + 3, entropy, mask=valid)
    tl.store(decisions + row, leaves, mask=valid)


@triton.jit
def _read(
    logits: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    states: tl.tensor,
    thresholds: tl.tensor,
    stats: tl.tensor,
    decisions: tl.tensor,
    rows: int,
    vocabulary: int,
    CONFIDENT: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < rows
    part = tl.program_id(1)
    lanes = tl.arange(0, B)
    first = tl.zeros([R, B], dtype=tl.float32) - float("inf")
    second = tl.zeros([R, B], dtype=tl.float32) - float("inf")
    total = tl.zeros([R, B], dtype=tl.float32)
    weighted = tl.zeros([R, B], dtype=tl.float32)
    broken = tl.zeros([R, B], dtype=tl.int32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, vocabulary), B):
        column = start + lanes
        inside = valid[:, None] & (column < vocabulary)[None, :]
        at = logits + row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
        logit = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        broken = tl.where(logit < float("inf"), broken, 1)
        second = tl.maximum(second, tl.minimum(first, logit))
        # Of the two, the smaller is taken relative to the larger: one exponential a token.
        higher = logit > first
        below = tl.maximum(-tl.abs(logit - first), _NOTHING)
        share = tl.exp(below)
        weighted = tl.where(higher, share * (weighted + below * total), weighted + share * below)
        total = tl.where(higher, share * total + 1.0, total + share)
        first = tl.maximum(first, logit)
    first, second, total, weighted = _joined(first, second, total, weighted, lanes)
    total = tl.where(tl.max(broken, axis=1) > 0, float("nan"), total)
    if PARTS == 1:
        _decide(row, valid, first, second, total, weighted, thresholds, stats, decisions, CONFIDENT)
    else:
        at = states + (row * PARTS + part) * 4
        tl.store(at, first, mask=valid)
        tl.store(at + 1, second, mask=valid)
        tl.store(at + 2, total, mask=valid)
        tl.store(at + 3, weighted, mask=valid)


@triton.jit
def _join(
    states: tl.tensor,
    thresholds: tl.tensor,
    stats: tl.tensor,
    decisions: tl.tensor,
    rows: int,
    CONFIDENT: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < rows
    parts = tl.arange(0, P)
    inside = valid[:, None] & (parts < PARTS)[None, :]
    at = states + (row[:, None] * PARTS + parts[None, :]) * 4
    first = tl.load(at, mask=inside, other=float("-inf"))
    second = tl.load(at + 1, mask=inside, other=float("-inf"))
    total = tl.load(at + 2, mask=inside, other=0.0)
    weighted = tl.load(at + 3, mask=inside, other=0.0)
    first, second, total, weighted = _joined(first, second, total, weighted, parts)
    _decide(row, valid, first, second, total, weighted, thresholds, stats, decisions, CONFIDENT)


def exit_decision(
    logits: torch.Tensor, threshold: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sluice.kernels.ops.exit_decision.exit_decision`."""
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, _PART)
    stats = torch.empty((rows, 4), dtype=torch.float32, device=logits.device)
    decisions = torch.empty(rows, dtype=torch.bool, device=logits.device)
    states = stats
    if parts > 1:
        states = torch.empty((rows, parts, 4), dtype=torch.float32, device=logits.device)
    threshold = threshold.contiguous()
    lanes = min(_LANES, triton.next_power_of_2(vocabulary))
    per_program = max(1, min(16, _LANES // lanes))
    _read[(triton.cdiv(rows, per_program), parts)](
        logits,
        *logits.stride(),
        states,
        threshold,
        stats,
        decisions,
        rows,
        vocabulary,
        CONFIDENT=measure == CONFIDENCE,
        PARTS=parts,
        PART=_PART,
        R=per_program,
        B=lanes,
    )
    if parts > 1:
        block = triton.next_power_of_2(parts)
        per_program = max(1, min(16, _LANES // block))
        _join[(triton.cdiv(rows, per_program),)](
            states,
            threshold,
            stats,
            decisions,
            rows,
            CONFIDENT=measure == CONFIDENCE,
            PARTS=parts,
            R=per_program,
            P=block,
        )
    return stats, decisions
