"""Hidden-state propagation where the K/V cache holds latents.

A token's entry is the normalised latent and one rotary key that all heads share: multi-head latent
attention, DeepSeek-V2 (arXiv 2405.04434, section 2.1). It comes from one projection, so a token
that only fills runs neither queries nor heads.
"""

from __future__ import annotations

from typing import Any

import torch

from sluice.models.seams.attention import write_latents
from sluice.models.stack import DecoderLayer


def fill_latent(layer: DecoderLayer, positions: torch.Tensor, normed: torch.Tensor) -> None:
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
    write_latents(layer.attention_op, latent, key)
