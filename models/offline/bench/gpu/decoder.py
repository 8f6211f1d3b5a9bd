"""A decoder with random weights whose decode steps run on static buffers; needs no vLLM.

Its modules are those of transformers. Its K/V cache has one place per row and position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sluice.models.engine.captured.decode import DecodeRows, Pair


class StaticDecoder:
    """Layers, final norm and LM head of a Llama of random weights."""

    def __init__(
        self, config: Any, rows: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make it.

        Args:
            config: `transformers.LlamaConfig`.
            rows: of a step, at most.
            context: positions of a row.
            dtype: of weights and cache.
            device: of both.
        """
        from transformers import LlamaForCausalLM

        with torch.device(device):
            self.model: Any = LlamaForCausalLM(config).to(dtype).eval()
        self.layers = [
            StaticLayer(layer, self.model, rows, context) for layer in self.model.model.layers
        ]

    def logits(self, delta: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """LM head of the state, (rows, vocabulary)."""
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(delta + residual))
        return logits


class StaticLayer:
    """Implements `sluice.models.engine.captured.decode.DecodeLayer`.

    Attributes:
        keys: (rows, context + 1, heads, head size); what is not to be kept goes to the last place.
        values: the same.
    """

    def __init__(self, layer: Any, model: Any, rows: int, context: int) -> None:
        self._layer = layer
        self._rotary = model.model.rotary_emb
        config, weight = model.config, layer.self_attn.k_proj.weight
        heads, size = config.num_key_value_heads, layer.self_attn.head_dim
        self._split = (-1, size)
        self._context = context
        self.keys = weight.new_zeros((rows, context + 1, heads, size))
        self.values = torch.zeros_like(self.keys)
        self._rows = torch.arange(rows, device=weight.device)
        self._places = torch.arange(context, device=weight.device)

    def attend(self, rows: DecodeRows) -> Pair:
        """See `DecodeLayer.attend`."""
        residual = rows.delta + rows.residual
        attention, count = self._layer.self_attn, len(residual)
        normed = self._layer.input_layernorm(residual)
        self._write(normed, rows)
        query = self._turned(attention.q_proj(normed), rows.positions)
        seen = self._places <= rows.positions[:, None]
        attended = scaled_dot_product_attention(
            query[:, :, None],
            self.keys[:count, : self._context].transpose(1, 2),
            self.values[:count, : self._context].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=True,
        )
        return attention.o_proj(attended.reshape(count, -1)), residual

    def run_mlp(self, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
        """See `DecodeLayer.run_mlp`."""
        residual = delta + residual
        return self._layer.mlp(self._layer.post_attention_layernorm(residual)), residual

    def fill(self, rows: DecodeRows) -> None:
        """See `DecodeLayer.fill`."""
        self._write(self._layer.input_layernorm(rows.delta + rows.residual), rows)

    def _write(self, normed: torch.Tensor, rows: DecodeRows) -> None:
        attention, own = self._layer.self_attn, self._rows[: len(normed)]
        places = torch.where(rows.writes, rows.positions, self._context)
        self.keys[own, places] = self._turned(attention.k_proj(normed), rows.positions)
        self.values[own, places] = attention.v_proj(normed).view(len(normed), *self._split)

    def _turned(self, projected: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """After the rotary embedding, (rows, heads, head size)."""
        from transformers.models.llama.modeling_llama import rotate_half

        heads = projected.view(len(projected), *self._split)
        cos, sin = (each[0, :, None] for each in self._rotary(heads, positions[None]))
        turned: torch.Tensor = heads * cos + rotate_half(heads) * sin
        return turned
