"""What an engine writes into its K/V cache, slot by slot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Written:
    """Last write of each slot, by layer name; and the slots in the order they were first used."""

    keys: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    order: dict[int, None] = field(default_factory=dict)

    def of_layer(self, name: str, states: dict[str, dict[int, Tensor]]) -> list[Tensor | None]:
        """Per position of the one request that ran, (kv_heads, head_dim), or None if unwritten."""
        return [states.get(name, {}).get(slot) for slot in self.order]


@contextmanager
def record_writes() -> Iterator[Written]:
    """Watch vLLM's CPU cache writes; meant for one request at a time."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    written = Written()
    stock = CPUAttentionBackendImpl.do_kv_cache_update

    def update(
        self: Any, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        stock(self, layer, key, value, cache, slots)
        keys = written.keys.setdefault(layer.layer_name, {})
        values = written.values.setdefault(layer.layer_name, {})
        for row, slot in enumerate(slots.tolist()):
            keys[slot], values[slot] = key[row].clone(), value[row].clone()
            written.order.setdefault(slot)

    CPUAttentionBackendImpl.do_kv_cache_update = update
    try:
        yield written
    finally:
        CPUAttentionBackendImpl.do_kv_cache_update = stock


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
