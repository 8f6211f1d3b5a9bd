"""A loaded model as layers whose parts the layer loop can call.

Reads the modules of vLLM's model classes by the names in `sluice.models.vllm_adapter.families`,
and calls their `compute_logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.vllm_adapter.families import DecoderFamily
from sluice.models.vllm_adapter.key_values import KeyValues
from sluice.models.vllm_adapter.patching import SeamMovedError

Norm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The parts of one layer, as vLLM loaded them."""

    attention_norm: Norm
    attention: nn.Module
    attention_op: nn.Module
    mlp_norm: Norm
    mlp: nn.Module
    projections: tuple[nn.Module, ...]
    """All projections of the attention."""
    fill_projections: tuple[nn.Module, ...]
    """Those that K/V come from, without the rows of queries where `key_values` leaves them out."""
    latent: bool
    """The K/V cache holds latents; see `AttentionKind`."""
    key_values: KeyValues | None
    """The way to K/V alone; None where only the attention itself knows it."""

    @property
    def fills_alone(self) -> bool:
        """Whether K/V are written by tensor operations alone, without the attention module."""
        return self.latent or self.key_values is not None

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
    head: int = 0
    """Parameters of the LM head, on this rank."""

    @classmethod
    def from_model(cls, model: nn.Module, family: DecoderFamily) -> DecoderStack:
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
            head=sum(weight.numel() for weight in _part(model, "lm_head").parameters()),
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
        """Parameters a token multiplies with: of layers, modules and LM head, on this rank.

        Args:
            experts_per_token: the model's top-k; 0 for a dense model.
            experts: routed experts per layer; 0 for a dense model.
        """
        routed = [_stacked(layer.mlp) / max(experts, 1) for layer in self.layers]
        modules = [
            (_linear(*layer.projections), _linear(layer.mlp) + experts_per_token * expert)
            for layer, expert in zip(self.layers, routed, strict=True)
        ]
        # Filling stops before attending and projecting out.
        fill = [_linear(*layer.fill_projections) for layer in self.layers]
        return ModuleCost(np.array(modules), np.array(fill), max(routed), float(self.head))


def _layer(module: nn.Module, family: DecoderFamily) -> DecoderLayer:
    for name in family.absent:
        if getattr(module, name, None) is not None:
            raise ValueError(f"{family.name} checkpoints with {name} are not supported")
    attention = _part(module, family.attention)
    kind = family.attention_kind
    key_values = None if kind.latent else KeyValues.from_attention(attention)
    fill = _projections(attention, kind.fill_projections)
    return DecoderLayer(
        attention_norm=_part(module, family.attention_norm),
        attention=attention,
        attention_op=_part(attention, family.attention_op),
        mlp_norm=_part(module, family.mlp_norm),
        mlp=_part(module, family.mlp),
        projections=_projections(attention, kind.projections),
        fill_projections=fill if key_values is None else (key_values.projection,),
        latent=kind.latent,
        key_values=key_values,
    )


def _projections(attention: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, ...]:
    """The projections that the checkpoint has; of the others, the attribute is there and None."""
    for name in names:
        if not hasattr(attention, name):
            raise SeamMovedError(f"`{name}` on {type(attention).__name__}")
    return tuple(part for name in names if (part := getattr(attention, name)) is not None)


def _part(owner: nn.Module, path: str) -> Any:
    part: Any = owner
    for name in path.split("."):
        inner = getattr(part, name, None)
        if inner is None:
            raise SeamMovedError(f"`{name}` on {type(part).__name__}")
        part = inner
    return part


def input_width(linear: Any) -> int:
    """Columns of a vLLM linear part's input, on this rank."""
    return int(getattr(linear, "input_size_per_partition", linear.input_size))


def _linear(*modules: nn.Module) -> float:
    """Weights of all linear parts, by their declared sizes.

    vLLM's CPU backend repacks the weights and leaves empty parameters behind.
    """
    from vllm.model_executor.layers.linear import LinearBase

    parts = (part for module in modules for part in module.modules())
    return sum(
        float(getattr(part, "output_size_per_partition", part.output_size)) * input_width(part)
        for part in parts
        if isinstance(part, LinearBase)
    )


def _stacked(module: nn.Module) -> float:
    """Weights of all routed experts, which stay tensors of (experts, out, in)."""
    return float(sum(p.numel() for p in module.parameters() if p.dim() == 3))
