"""Keys and values for tokens that pass a layer by: hidden-state propagation.

Source: CALM (arXiv 2207.07061): a skipped layer's K/V come from the hidden state that skipped it,
through that layer's own projection, never from another layer's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sluice.kernels.kv_fill import kv_fill
from sluice.models.depth.latent_fill import fill_latent
from sluice.models.seams.attention import paged_cache, write_keys_values
from sluice.models.seams.key_values import KeyValues
from sluice.models.stack import DecoderLayer


class _KeysValuesWritten(Exception):
    """Leaves an attention module once its K/V are written; never escapes this file."""


def fill_keys_values(layer: DecoderLayer, positions: torch.Tensor, normed: torch.Tensor) -> None:
    """Write K/V of `normed` (rows, hidden) at `positions` (rows,) without attending.

    The slots are those of the current forward context. Where the projection's K/V rows can run
    alone, they do. Otherwise the model's own attention module runs its projection, norms and
    rotary embedding; what is replaced, for this call, is its attention operation, and raising from
    there spares the output projection.

    Raises:
        RuntimeError: the attention module did not come to its attention operation.
    """
    if layer.latent:
        fill_latent(layer, positions, normed)
        return
    if layer.key_values is not None:
        _fill(layer.attention_op, layer.key_values, positions, normed)
        return
    with _write_only(layer.attention_op):
        try:
            layer.attention(positions=positions, hidden_states=normed)
        except _KeysValuesWritten:
            return
    raise RuntimeError(f"{layer.kv_name} never reached its attention operation")


def _fill(
    attention_op: Any, key_values: KeyValues, positions: torch.Tensor, normed: torch.Tensor
) -> None:
    key, value = key_values.project(normed)
    cache = paged_cache(attention_op)
    if cache is None:
        key = key_values.turned(positions, key_values.normed(key))
        write_keys_values(attention_op, key, value)
        return
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
