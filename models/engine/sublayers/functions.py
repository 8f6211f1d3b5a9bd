"""The parts of a layer as functions of the residual stream, for every family.

The stream is vLLM's pair `(delta, residual)`, (rows, hidden) each, whose sum is the hidden state. A
part adds `delta` to the residual in its norm and returns its own output as the new `delta`.
"""

from __future__ import annotations

import torch

from sluice.models.vllm_adapter.decoder import DecoderLayer, DecoderStack
from sluice.models.vllm_adapter.kv_fill import fill_keys_values

Pair = tuple[torch.Tensor, torch.Tensor]


def attend(
    layer: DecoderLayer, delta: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
) -> Pair:
    """Attention of rows at `positions`, (rows,), int64; the forward context has their slots."""
    normed, residual = layer.attention_norm(delta, residual)
    return layer.attention(positions=positions, hidden_states=normed), residual


def run_mlp(layer: DecoderLayer, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
    """MLP or mixture of experts."""
    normed, residual = layer.mlp_norm(delta, residual)
    return layer.mlp(normed), residual


def fill(
    layer: DecoderLayer, delta: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Write K/V of rows at `positions` without attending; the pair stays as it is.

    Returns:
        What vLLM's operation returns, empty: without it a compiler would take the write for dead.
    """
    # Norms work in place.
    normed, _ = layer.attention_norm(delta.clone(), residual.clone())
    return fill_keys_values(layer, positions, normed)


def final_norm(stack: DecoderStack, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
    """What the LM head reads, and the residual."""
    return stack.final_norm(delta, residual)
