"""`kv_fill` in Triton; arguments are in `sluice.kernels.ops.kv_fill`."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_BLOCK = 1024
"""Numbers of a row's keys that a program holds: heads times padded head size."""


@triton.jit
def _fill(
    key: tl.tensor,
    value: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    slots: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    norm_weight: tl.tensor,
    eps: float,
    heads: int,
    block_size: int,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_step: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_step: tl.tensor,
    key_cache_block: tl.tensor,
    key_cache_slot: tl.tensor,
    key_cache_head: tl.tensor,
    key_cache_step: tl.tensor,
    value_cache_block: tl.tensor,
    value_cache_slot: tl.tensor,
    value_cache_head: tl.tensor,
    value_cache_step: tl.tensor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    ROTARY: tl.constexpr,
    NEOX: tl.constexpr,
    NORMED: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
) -> None:
    HALF: tl.constexpr = ROTARY // 2
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        head = tl.program_id(1) * N + tl.arange(0, N)
        exists = (head < heads)[:, None]

        pair = tl.arange(0, P)
        turning = exists & (pair < HALF)[None, :]
        one, two = pair, pair + HALF
        if not NEOX:
            one, two = pair * 2, pair * 2 + 1
        key_at = key + row * key_stride + head[:, None] * key_head_stride
        first = tl.load(key_at + one[None, :] * key_step, mask=turning, other=0.0).to(tl.float32)
        second = tl.load(key_at + two[None, :] * key_step, mask=turning, other=0.0).to(tl.float32)
        beyond = ROTARY + tl.arange(0, Q)
        resting = exists & (beyond < HEAD)[None, :]
        rest = tl.zeros([N, Q], dtype=tl.float32)
        if ROTARY < HEAD:
            at = key_at + beyond[None, :] * key_step
            rest = tl.load(at, mask=resting, other=0.0).to(tl.float32)
        if NORMED:
            squares = tl.sum(first * first + second * second, axis=1)
            squares += tl.sum(rest * rest, axis=1)
            scale = (1.0 / tl.sqrt(squares / HEAD + eps))[:, None]
            weight = tl.load(norm_weight + one, mask=pair < HALF, other=0.0).to(tl.float32)
            first = first * scale * weight[None, :]
            weight = tl.load(norm_weight + two, mask=pair < HALF, other=0.0).to(tl.float32)
            second = second * scale * weight[None, :]
            weight = tl.load(norm_weight + beyond, mask=beyond < HEAD, other=0.0).to(tl.float32)
            rest = rest * scale * weight[None, :]

        angles = cos_sin + tl.load(positions + row) * ROTARY + pair
        cos = tl.load(angles, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        entry = key_cache + block * key_cache_block + offset * key_cache_slot
        entry += head[:, None] * key_cache_head
        tl.store(entry + one[None, :] * key_cache_step, first * cos - second * sin, mask=turning)
        tl.store(entry + two[None, :] * key_cache_step, second * cos + first * sin, mask=turning)
        if ROTARY < HEAD:
            tl.store(entry + beyond[None, :] * key_cache_step, rest, mask=resting)

        column = tl.arange(0, V)
        inside = exists & (column < VALUE)[None, :]
        value_at = value + row * value_stride + head[:, None] * value_head_stride
        values = tl.load(value_at + column[None, :] * value_step, mask=inside, other=0.0)
        entry = value_cache + block * value_cache_block + offset * value_cache_slot
        entry += head[:, None] * value_cache_head
        tl.store(entry + column[None, :] * value_cache_step, values, mask=inside)


def kv_fill(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    neox: bool,
) -> None:
    """See `sluice.kernels.ops.kv_fill.kv_fill`."""
    rows, heads, size = key.shape
    if not rows:
        return
    rotary, value_size = cos_sin.shape[1], value.shape[2]
    per_program = max(1, _BLOCK // triton.next_power_of_2(size))
    per_program = min(per_program, triton.next_power_of_2(heads))
    _fill[(rows, triton.cdiv(heads, per_program))](
        key,
        value,
        positions,
        cos_sin,
        slots,
        key_cache,
        value_cache,
        norm_weight,
        norm_eps,
        heads,
        key_cache.shape[1],
        *key.stride(),
        *value.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        HEAD=size,
        VALUE=value_size,
        ROTARY=rotary,
        NEOX=neox,
        NORMED=norm_weight.numel() > 0,
        N=per_program,
        P=triton.next_power_of_2(max(rotary // 2, 1)),
        Q=triton.next_power_of_2(max(size - rotary, 1)),
        V=triton.next_power_of_2(value_size),
    )
