"""The epilogue of filling keys and values: norm, rotary embedding, and the write into the cache.

Sources: RMS norm of keys by head, as Qwen3 has it; rotary embedding, RoFormer (arXiv 2104.09864),
with the table of angles and the two pairings that vLLM has; paged caches (arXiv 2309.06180).

The cache is that of vLLM's flash and Triton attention: entries of a head lie together, whatever the
order of blocks, slots and heads. vLLM's CPU attention keeps keys in a packed order of its own that
only its own operation writes; caches of fp8 with scales are not served either.
"""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation


def _fake(
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
    return None


@operation(
    fake=_fake,
    mutates=("key_cache", "value_cache"),
    triton="sluice.kernels.triton.kv_fill:kv_fill",
)
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
    """Write projected keys and values of rows into their slots; computed in fp32, rounded once.

    Args:
        key: (rows, kv_heads, head_size), any float dtype, any strides; as projected.
        value: (rows, kv_heads, value_size), any float dtype, any strides.
        positions: (rows,), int64, in [0, max_position).
        cos_sin: (max_position, rotary_dim), any float dtype, contiguous: cosines of a position's
            rotary_dim / 2 angles, then sines. What of a head is beyond `rotary_dim` stays.
        slots: (rows,), int64: block * block_size + offset; a row below 0 writes nothing. No slot
            twice.
        key_cache: (blocks, block_size, kv_heads, head_size), any float dtype, any strides.
        value_cache: (blocks, block_size, kv_heads, value_size), any float dtype, any strides.
        norm_weight: (head_size,), any float dtype, of the RMS norm of each key; or (0,) for none.
        norm_eps: of that norm.
        neox: pairs that turn are (i, i + rotary_dim / 2); else neighbours, (2i, 2i + 1).
    """
    kept = slots >= 0
    key, value, slots = key[kept].float(), value[kept], slots[kept]
    if norm_weight.numel():
        scale = (key.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        key = key * scale * norm_weight.float()
    cos, sin = cos_sin[positions[kept]].float().unsqueeze(1).chunk(2, dim=-1)
    rotary = cos_sin.shape[1]
    turning, rest = key[..., :rotary], key[..., rotary:]
    first, second = turning.chunk(2, -1) if neox else (turning[..., ::2], turning[..., 1::2])
    turned = (first * cos - second * sin, second * cos + first * sin)
    turning = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
    key = torch.cat([turning, rest], -1)
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key.to(key_cache.dtype)
    value_cache[block, offset] = value.to(value_cache.dtype)
