"""Seam: keys and values without queries, which vLLM projects together.

vLLM packs queries, keys and values into the weight of one `QKVParallelLinear`. A token that only
fills K/V needs no query, so the weight's rows of keys and values become a linear layer here, of
vLLM's class `ReplicatedLinear`: vLLM chooses its kernel too. On CUDA they are a view of the packed
weight. On a CPU, vLLM repacks that weight for its kernel and drops what was loaded
(`UnquantizedLinearMethod.process_weights_after_loading`), so `keep_rows` copies them just before,
and they are packed again: a second copy of the K/V rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from sluice.models.vllm_adapter.patching import SeamMovedError, wrap_once

_KEPT = "_sluice_key_value_rows"
"""Attribute of a layer between its packing and `KeyValues.from_attention`."""


@dataclass(frozen=True, slots=True)
class KeyValues:
    """The way from an attention's input to what its cache holds.

    Attributes:
        projection: from (rows, hidden) to (rows, kv_heads * (head_size + value_size)).
        norm: RMS norm of the keys, by head or by row, or None.
        rotary: vLLM's rotary embedding of the attention.
        heads: of keys and values, on this rank.
        head_size: of keys.
        value_size: of values.
    """

    projection: nn.Module
    norm: Any
    rotary: Any
    heads: int
    head_size: int
    value_size: int

    @classmethod
    def from_attention(cls, attention: nn.Module) -> Self | None:
        """Keys and values of an attention with a plain packed projection.

        None where the way is another one, and only the attention itself knows it: quantised
        weights, adapters, a rotary embedding that is more than a table, a norm across ranks.

        Raises:
            SeamMovedError: vLLM packed the weight, and no rows were kept.
        """
        from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

        packed: Any = getattr(attention, "qkv_proj", None)
        rotary, norm = (getattr(attention, name, None) for name in ("rotary_emb", "k_norm"))
        if type(packed) is not QKVParallelLinear:
            return None
        kept = packed.__dict__.pop(_KEPT, None)
        if type(packed.quant_method) is not UnquantizedLinearMethod or packed.skip_bias_add:
            return None
        if not _is_table(rotary):
            return None
        if norm is not None and not _is_rms_norm(norm, packed.num_kv_heads, packed.head_size):
            return None
        if kept is None and not packed.weight.numel():
            raise SeamMovedError("rows of a packed weight where they are kept")
        return cls(
            projection=_projection(packed, kept),
            norm=norm,
            rotary=rotary,
            heads=packed.num_kv_heads,
            head_size=packed.head_size,
            value_size=packed.v_head_size,
        )

    @property
    def by_head(self) -> bool:
        """Whether there is a norm, of each head by itself."""
        return self.norm is not None and len(self.norm.weight) == self.head_size

    def project(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rows, kv_heads, head_size) and values (rows, kv_heads, value_size), as projected.

        Args:
            normed: (rows, hidden), after the attention's input norm.
        """
        widths = [self.heads * self.head_size, self.heads * self.value_size]
        key, value = self.projection(normed).split(widths, dim=-1)
        return key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))

    def normed(self, key: torch.Tensor) -> torch.Tensor:
        """Keys after their norm, if they have one. `key`: (rows, kv_heads, head_size)."""
        if self.norm is None:
            return key
        normed: torch.Tensor = self.norm(key if self.by_head else key.flatten(1))
        return normed.view_as(key)

    def turned(self, positions: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Keys after their rotary embedding, which may have been done in place.

        Args:
            positions: (rows,), int64.
            key: (rows, kv_heads, head_size).
        """
        # What it calls queries may be anything; there are no keys beside them.
        turned: torch.Tensor = self.rotary(positions, key.flatten(1), None)[0]
        return turned.view_as(key)


def _is_table(rotary: Any) -> bool:
    """Whether a rotary embedding is nothing but its table of cosines and sines."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    if not isinstance(rotary, RotaryEmbedding) or rotary.use_flashinfer:
        return False
    forwards = ("forward_native", "forward_cpu", "forward_cuda")
    return all(getattr(type(rotary), f) is getattr(RotaryEmbedding, f) for f in forwards)


def _is_rms_norm(norm: Any, heads: int, head_size: int) -> bool:
    from vllm.model_executor.layers.layernorm import RMSNorm

    if type(norm) is not RMSNorm or norm.variance_size_override is not None or not norm.has_weight:
        return False
    return len(norm.weight) in (head_size, heads * head_size)


def _projection(packed: Any, kept: torch.Tensor | None) -> nn.Module:
    """The rows of keys and values of a QKV projection as a linear part."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    first = packed.num_heads * packed.head_size
    bias = packed.bias
    rows = packed.weight.data[first:] if kept is None else kept
    with torch.device("meta"):
        linear: Any = ReplicatedLinear(
            packed.input_size,
            len(rows),
            bias=bias is not None,
            params_dtype=packed.params_dtype,
            return_bias=False,
            # These are the rows of this rank.
            disable_tp=True,
        )
    linear.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data[first:], requires_grad=False)
    linear.quant_method.process_weights_after_loading(linear)
    made: nn.Module = linear
    return made


def keep_rows() -> None:
    """Have vLLM's CPU linear layers leave a copy of their K/V rows; before a model is loaded."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

    def keeping(stock: Any) -> Callable[..., Any]:
        def process(method: Any, layer: Any) -> Any:
            if type(layer) is QKVParallelLinear and layer.weight.device.type == "cpu":
                first = layer.num_heads * layer.head_size
                setattr(layer, _KEPT, layer.weight.data[first:].clone())
            return stock(method, layer)

        return process

    wrap_once(UnquantizedLinearMethod, "process_weights_after_loading", keeping)
