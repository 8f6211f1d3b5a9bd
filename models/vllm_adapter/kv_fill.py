"""Seam: keys and values (K/V) of tokens that do not attend in a layer: hidden-state propagation.

Source: CALM (arXiv 2207.07061): a skipped layer's K/V come from the hidden state that skipped it,
through that layer's own projection, never from another layer's cache.

Writes through vLLM's operations `unified_kv_cache_update` and `unified_mla_kv_cache_update`, or
straight into the cache that vLLM's flash and Triton attention lay out, at the slots of the current
forward context. Where K/V cannot be projected alone, the model's attention module runs with its
attention operation's `forward` replaced for the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import _encode_layer_name, is_quantized_kv_cache

from sluice.kernels.ops.kv_fill import kv_fill
from sluice.models.vllm_adapter.decoder import DecoderLayer
from sluice.models.vllm_adapter.key_values import KeyValues

_PAGED = ("FLASH_ATTN", "TRITON_ATTN")
"""Attention backends whose caches `paged_cache` knows."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """A layer's cache as vLLM's flash and Triton attention lay it out, and where rows go in it.

    Attributes:
        keys: (blocks, block_size, kv_heads, head_size), strided.
        values: (blocks, block_size, kv_heads, value_size), strided.
        slots: of the forward context's rows, int64, (rows,).
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


def paged_cache(attention_op: Any) -> PagedCache | None:
    """The cache of a vLLM `Attention` layer; None where only its backend can write it.

    The CPU's attention packs keys in an order of its own, and quantised caches have scales.
    """
    if attention_op.attn_backend.get_name() not in _PAGED:
        return None
    if is_quantized_kv_cache(attention_op.kv_cache_dtype):
        return None
    sizes = [attention_op.head_size, attention_op.head_size_v]
    # Keys and values of a head lie together; heads come before slots in the shape.
    keys, values = attention_op.kv_cache.transpose(1, 2).split(sizes, dim=-1)
    slots = get_forward_context().slot_mapping[attention_op.layer_name]
    return PagedCache(keys, values, slots)


def write_keys_values(attention_op: Any, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Write K/V at the forward context's slots, without attending; `fill_keys_values` returns it.

    Args:
        attention_op: vLLM `Attention` layer.
        key: (rows, kv_heads * head_size) or by head, after rotary embedding.
        value: (rows, kv_heads * value_size) or by head.
    """
    written: torch.Tensor = torch.ops.vllm.unified_kv_cache_update(
        key.view(-1, attention_op.num_kv_heads, attention_op.head_size),
        value.view(-1, attention_op.num_kv_heads, attention_op.head_size_v),
        _encode_layer_name(attention_op.layer_name),
    )
    return written


def write_latents(attention_op: Any, latent: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Write the entries of a latent attention's cache at the forward context's slots.

    Args:
        attention_op: vLLM `MLAAttention` layer.
        latent: (rows, kv_lora_rank), normalised.
        key: (rows, 1, qk_rope_head_dim), after rotary embedding.
    """
    written: torch.Tensor = torch.ops.vllm.unified_mla_kv_cache_update(
        latent,
        key,
        _encode_layer_name(attention_op.layer_name),
        attention_op.kv_cache_dtype,
        attention_op._k_scale,
    )
    return written


def fill_latent(layer: DecoderLayer, positions: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """Write the entries of `normed` (rows, hidden) at `positions` (rows,) without attending.

    The slots are those of the current forward context.
    """
    attention: Any = layer.attention
    (projection,) = layer.fill_projections
    widths = [attention.kv_lora_rank, attention.qk_rope_head_dim]
    # The compressed queries, where there are any, come before the latent.
    latent, key = projection(normed)[0][:, -sum(widths) :].split(widths, dim=-1)
    latent, key = attention.kv_a_layernorm(latent), key.unsqueeze(1)
    if attention.rotary_emb is not None:
        # It wants queries too, and may turn them in place.
        _, key = attention.rotary_emb(positions, key.clone(), key)
    return write_latents(layer.attention_op, latent, key)


class _KeysValuesWritten(Exception):
    """Leaves an attention module once its K/V are written; never escapes this file."""


def fill_keys_values(
    layer: DecoderLayer, positions: torch.Tensor, normed: torch.Tensor
) -> torch.Tensor:
    """Write K/V of `normed` (rows, hidden) at `positions` (rows,) without attending.

    The slots are those of the current forward context. Where the projection's K/V rows can run
    alone, they do. Otherwise the model's own attention module runs its projection, norms and
    rotary embedding; what is replaced, for this call, is its attention operation, and raising from
    there spares the output projection.

    Returns:
        An empty tensor. A compiler that sees nobody use it takes the write for dead.

    Raises:
        RuntimeError: the attention module did not come to its attention operation.
    """
    if layer.latent:
        return fill_latent(layer, positions, normed)
    if layer.key_values is not None:
        return _fill(layer.attention_op, layer.key_values, positions, normed)
    with _write_only(layer.attention_op):
        try:
            layer.attention(positions=positions, hidden_states=normed)
        except _KeysValuesWritten:
            return normed.new_empty(0)
    raise RuntimeError(f"{layer.kv_name} never reached its attention operation")


def _fill(
    attention_op: Any, key_values: KeyValues, positions: torch.Tensor, normed: torch.Tensor
) -> torch.Tensor:
    key, value = key_values.project(normed)
    cache = paged_cache(attention_op)
    if cache is None:
        key = key_values.turned(positions, key_values.normed(key))
        return write_keys_values(attention_op, key, value)
    rotary, norm = key_values.rotary, key_values.norm
    weight, eps = key.new_empty(0), 0.0
    if key_values.by_head:
        weight, eps = norm.weight, norm.variance_epsilon
    else:
        key = key_values.normed(key)
    kv_fill(
        key,
        value,
        positions,
        rotary.cos_sin_cache,
        cache.slots,
        cache.keys,
        cache.values,
        weight,
        eps,
        rotary.is_neox_style,
    )
    return key.new_empty(0)


@contextmanager
def _write_only(attention_op: Any) -> Iterator[None]:
    def write(_query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        write_keys_values(attention_op, key, value)
        raise _KeysValuesWritten

    # An instance attribute shadows the class's `forward` and disappears again with `del`.
    attention_op.forward = write
    try:
        yield
    finally:
        del attention_op.forward
