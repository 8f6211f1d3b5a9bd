"""A loaded model seen through its family's description: layers as parts the loop can call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.models.families import DecoderFamily
from sluice.models.telemetry import ModuleCost

Norm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class SeamMovedError(RuntimeError):
    """vLLM no longer has a part that Sluice calls; names the part and the vLLM version."""

    def __init__(self, what: str) -> None:
        import vllm

        super().__init__(
            f"vLLM {vllm.__version__} has no {what}: Sluice was written against 0.32.0 and its "
            "seam has moved; use the pinned version."
        )


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The parts of one layer, as vLLM loaded them."""

    attention_norm: Norm
    attention: nn.Module
    attention_op: nn.Module
    mlp_norm: Norm
    mlp: nn.Module

    @property
    def kv_name(self) -> str:
        """Name under which vLLM's forward context knows this layer's K/V cache."""
        return str(self.attention_op.layer_name)


@dataclass(frozen=True, slots=True)
class DecoderStack:
    """A decoder between token ids and final hidden states."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm

    @classmethod
    def of(cls, model: nn.Module, family: DecoderFamily) -> DecoderStack:
        """Look the parts up once.

        Raises:
            SeamMovedError: a part the family names is missing.
            ValueError: the checkpoint uses an optional part that the loop does not run.
        """
        decoder = _part(model, family.decoder)
        return cls(
            embed=_part(decoder, family.embed),
            layers=tuple(_layer(m, family) for m in _part(decoder, family.layers)),
            final_norm=_part(decoder, family.final_norm),
        )

    def cost(self, family: DecoderFamily, experts_per_token: int, experts: int) -> ModuleCost:
        """Active parameters per token and module, read off the loaded weights."""
        share = experts_per_token / experts if family.moe and experts else 1.0
        modules = [
            (_parameters(layer.attention, 1.0), _parameters(layer.mlp, share))
            for layer in self.layers
        ]
        fill = [_fill_parameters(layer) for layer in self.layers]
        return ModuleCost(np.array(modules), np.array(fill))


def _layer(module: nn.Module, family: DecoderFamily) -> DecoderLayer:
    for name in family.absent:
        if getattr(module, name, None) is not None:
            raise ValueError(f"{family.name} checkpoints with {name} are not supported")
    attention = _part(module, family.attention)
    return DecoderLayer(
        attention_norm=_part(module, family.attention_norm),
        attention=attention,
        attention_op=_part(attention, family.attention_op),
        mlp_norm=_part(module, family.mlp_norm),
        mlp=_part(module, family.mlp),
    )


def _part(owner: nn.Module, name: str) -> Any:
    part = getattr(owner, name, None)
    if part is None:
        raise SeamMovedError(f"`{name}` on {type(owner).__name__}")
    return part


def _parameters(module: nn.Module, expert_share: float) -> float:
    """Parameters a token multiplies with: experts' weights (3-D) count by the share chosen."""
    return sum(p.numel() * (expert_share if p.dim() == 3 else 1.0) for p in module.parameters())


def _fill_parameters(layer: DecoderLayer) -> float:
    """Filling runs the fused QKV projection and stops before attending and projecting out."""
    projection = getattr(layer.attention, "qkv_proj", layer.attention)
    return _parameters(projection, 1.0)
