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
    output_width: int
    """Width of what the attention hands to its output projection, on this rank."""

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
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None]

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
            compute_logits=_part(model, "compute_logits"),
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """LM head after the final norm.

        Args:
            hidden: residual stream, (rows, hidden); overwritten.

        Returns:
            (rows, vocabulary).
        """
        normed, _ = self.final_norm(hidden, torch.zeros_like(hidden))
        logits = self.compute_logits(normed)
        assert logits is not None, "the LM head gathers logits on one rank only"
        return logits

    def cost(self, experts_per_token: int, experts: int) -> ModuleCost:
        """Parameters a token multiplies with, per layer and module, on this rank.

        Args:
            experts_per_token: the model's top-k; 0 for a dense model.
            experts: routed experts per layer; 0 for a dense model.
        """
        share = experts_per_token / experts if experts else 1.0
        modules = [
            (_active(layer.attention, share), _active(layer.mlp, share)) for layer in self.layers
        ]
        # Filling runs the QKV projection and stops before attending and projecting out.
        fill = [_active(_part(layer.attention, "qkv_proj"), share) for layer in self.layers]
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
        output_width=int(_part(attention, "q_size")),
    )


def _part(owner: nn.Module, name: str) -> Any:
    part = getattr(owner, name, None)
    if part is None:
        raise SeamMovedError(f"`{name}` on {type(owner).__name__}")
    return part


def _active(module: nn.Module, expert_share: float) -> float:
    """Weights of all linear parts, and of stacked experts by the share a token chooses.

    Linear parts are counted by their declared sizes: vLLM's CPU backend repacks their weights and
    leaves empty parameters behind. Experts stay one tensor of (experts, out, in).
    """
    from vllm.model_executor.layers.linear import LinearBase

    total = 0.0
    for part in module.modules():
        if isinstance(part, LinearBase):
            rows = getattr(part, "output_size_per_partition", part.output_size)
            total += rows * getattr(part, "input_size_per_partition", part.input_size)
        else:
            own = part.parameters(recurse=False)
            total += sum(p.numel() * expert_share for p in own if p.dim() == 3)
    return total
