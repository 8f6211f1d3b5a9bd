"""What an engine writes into its K/V cache, slot by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Written:
    """Last write of each slot, by layer name; and the slots in the order they were first used.

    Layers of one cache group share their slots, and the order is the group's.
    """

    keys: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    order: dict[int, dict[int, None]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    def of_layer(self, name: str, states: dict[str, dict[int, Tensor]]) -> list[Tensor | None]:
        """Per position of the one request that ran, (kv_heads, head_dim), or None if unwritten."""
        order = self.order.get(self.groups.get(name, 0), {})
        return [states.get(name, {}).get(slot) for slot in order]


@contextmanager
def record_writes(groups: Mapping[str, int] | None = None) -> Iterator[Written]:
    """Watch vLLM's CPU cache writes; meant for one request at a time.

    `groups`: cache group of each layer by its name, where there are several.

    Of a latent attention, the latent stands for the keys and its rotary key for the values, one
    head each, as in transformers' cache.
    """
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    written = Written(groups=groups or {})
    stock, stock_latent = CPUAttentionBackendImpl.do_kv_cache_update, MLAAttention.update_kv_cache

    def record(layer: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
        keys = written.keys.setdefault(layer.layer_name, {})
        values = written.values.setdefault(layer.layer_name, {})
        order = written.order.setdefault(written.groups.get(layer.layer_name, 0), {})
        for row, slot in enumerate(slots.tolist()):
            keys[slot], values[slot] = key[row].clone(), value[row].clone()
            order.setdefault(slot)

    def update(
        self: Any, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        stock(self, layer, key, value, cache, slots)
        record(layer, key, value, slots)

    def update_latent(
        self: Any, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor, *args: Any
    ) -> None:
        stock_latent(self, latent, key, cache, slots, *args)
        record(self, latent[:, None], key, slots)

    CPUAttentionBackendImpl.do_kv_cache_update = update
    MLAAttention.update_kv_cache = update_latent
    try:
        yield written
    finally:
        CPUAttentionBackendImpl.do_kv_cache_update = stock
        MLAAttention.update_kv_cache = stock_latent


def in_pairs(rotated: Tensor) -> Tensor:
    """What transformers keeps of DeepSeek-V3's rotary keys, (..., dim), as vLLM keeps it.

    Rotary embedding turns pairs of neighbours; transformers puts the first ones of all pairs
    before the second ones.
    """
    return torch.stack(rotated.chunk(2, dim=-1), dim=-1).flatten(-2)


def assert_same_kv(
    written: Written, names: list[str], keys: list[Tensor], values: list[Tensor], needed: Tensor
) -> None:
    """Compare with the reference.

    `keys`, `values`: per layer, (kv_heads, positions, head_dim); `needed`: bool, (positions,
    layers): where K/V must be right. Everything that must be right must have been written.
    """
    for layer, name in enumerate(names):
        for states, expected in ((written.keys, keys), (written.values, values)):
            got = written.of_layer(name, states)
            for position in torch.nonzero(needed[:, layer]).flatten().tolist():
                slot = got[position]
                assert slot is not None, f"layer {layer}, position {position} was never written"
                torch.testing.assert_close(
                    slot,
                    expected[layer][:, position],
                    rtol=2e-4,
                    atol=2e-4,
                    msg=lambda m, p=position, la=layer: f"layer {la}, position {p}: {m}",
                )
