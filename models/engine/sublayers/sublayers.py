"""What the layer loop calls: the parts of each layer, plain or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sluice.models.engine.sublayers.compiled import Compiler
from sluice.models.engine.sublayers.functions import Pair, attend, fill, final_norm, run_mlp
from sluice.models.engine.sublayers.graphs import Tracer
from sluice.models.vllm_adapter.decoder import DecoderLayer, DecoderStack

Part = Callable[..., Any]
Keep = torch.Tensor | None
"""Whose output stays, bool, (rows, 1); None is everybody's."""


@dataclass(frozen=True, slots=True)
class SubLayers:
    """The parts of layers as functions of the pair `(delta, residual)`, by index of the layer.

    Attributes:
        attend: also of positions and a `Keep`; gives the pair.
        run_mlp: MLP or mixture of experts, also of a `Keep`; gives the pair.
        block: both on the same rows, also of positions and a `Keep` for each; gives the pair.
        fill: also of positions; writes K/V alone.
        final_norm: of the model; gives what the LM head reads, and the residual.
    """

    attend: Sequence[Part]
    run_mlp: Sequence[Part]
    block: Sequence[Part]
    fill: Sequence[Part]
    final_norm: Part


def plain_sublayers(stack: DecoderStack) -> SubLayers:
    """Parts that call the model's own modules."""
    return SubLayers(
        attend=[partial(_attend, layer) for layer in stack.layers],
        run_mlp=[partial(_run_mlp, layer) for layer in stack.layers],
        block=[partial(_block, layer) for layer in stack.layers],
        fill=[partial(fill, layer) for layer in stack.layers],
        final_norm=partial(final_norm, stack),
    )


def compiled_sublayers(stack: DecoderStack, compiler: Compiler) -> SubLayers:
    """Parts that are traced and compiled; a layer whose K/V only its attention can write is filled
    as in `plain_sublayers`.

    Raises:
        UntraceableError: a part is no pure graph of its inputs.
    """
    layers = stack.layers
    pair = {name: compiler.arguments[name] for name in ("delta", "residual")}
    attending = {**pair, "positions": compiler.arguments["positions"]}
    attentions = [(part, "keep_attention") for part in Tracer(attend, attending).trace(layers)]
    mlps = [(part, "keep_mlp") for part in Tracer(run_mlp, pair).trace(layers)]
    fills: list[Part] = [partial(fill, layer) for layer in layers]
    alone = [index for index, layer in enumerate(layers) if layer.fills_alone]
    traced = Tracer(fill, attending).trace([layers[index] for index in alone])
    for index, part in zip(alone, traced, strict=True):
        fills[index] = compiler.launch([(part, None)])
    (norm,) = Tracer(final_norm, pair).trace([stack])
    return SubLayers(
        attend=[compiler.launch([part]) for part in attentions],
        run_mlp=[compiler.launch([part]) for part in mlps],
        block=[compiler.launch(both) for both in zip(attentions, mlps, strict=True)],
        fill=fills,
        final_norm=compiler.launch([(norm, None)]),
    )


def _attend(
    layer: DecoderLayer,
    delta: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    keep: Keep,
) -> Pair:
    return _kept(*attend(layer, delta, residual, positions), keep)


def _run_mlp(layer: DecoderLayer, delta: torch.Tensor, residual: torch.Tensor, keep: Keep) -> Pair:
    return _kept(*run_mlp(layer, delta, residual), keep)


def _block(
    layer: DecoderLayer,
    delta: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    keep_attention: Keep,
    keep_mlp: Keep,
) -> Pair:
    pair = _attend(layer, delta, residual, positions, keep_attention)
    return _run_mlp(layer, *pair, keep_mlp)


def _kept(delta: torch.Tensor, residual: torch.Tensor, keep: Keep) -> Pair:
    return delta if keep is None else torch.where(keep, delta, 0), residual
