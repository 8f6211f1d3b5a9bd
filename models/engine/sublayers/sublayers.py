"""What the layer loop calls: the parts of each layer, plain or compiled."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sluice.models.engine.sublayers.compiled import Compiler
from sluice.models.engine.sublayers.functions import Pair, attend, fill, final_norm, run_mlp
from sluice.models.engine.sublayers.graphs import Tracer
from sluice.models.vllm_adapter.decoder import DecoderStack


class SubLayers:
    """Runs the parts of layers by calling the model's own modules."""

    def __init__(self, stack: DecoderStack) -> None:
        self._layers = stack.layers
        self._stack = stack

    def attend(
        self,
        index: int,
        delta: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> Pair:
        """Attention of layer `index`; `keep`, bool, (rows, 1), says whose output stays."""
        return _kept(*attend(self._layers[index], delta, residual, positions), keep)

    def run_mlp(
        self, index: int, delta: torch.Tensor, residual: torch.Tensor, keep: torch.Tensor | None
    ) -> Pair:
        """MLP or mixture of experts of layer `index`."""
        return _kept(*run_mlp(self._layers[index], delta, residual), keep)

    def block(
        self,
        index: int,
        delta: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        keep_attention: torch.Tensor | None,
        keep_mlp: torch.Tensor | None,
    ) -> Pair:
        """Both, on the same rows."""
        delta, residual = self.attend(index, delta, residual, positions, keep_attention)
        return self.run_mlp(index, delta, residual, keep_mlp)

    def fill(
        self, index: int, delta: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write K/V of layer `index` alone."""
        fill(self._layers[index], delta, residual, positions)

    def final_norm(self, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
        """As the decoder's own: what the LM head reads, and the residual, which may be any."""
        return self._stack.final_norm(delta, residual)


def _kept(delta: torch.Tensor, residual: torch.Tensor, keep: torch.Tensor | None) -> Pair:
    return delta if keep is None else torch.where(keep, delta, 0), residual


class CompiledSubLayers(SubLayers):
    """Runs the parts of layers compiled."""

    def __init__(
        self,
        stack: DecoderStack,
        compiler: Compiler,
        arguments: Mapping[str, torch.Tensor],
    ) -> None:
        """Trace and compile them.

        Args:
            stack: the model's layers.
            compiler: of their graphs.
            arguments: examples of the arguments, by name.

        Raises:
            UntraceableError: a part is no pure graph of its inputs.
        """
        super().__init__(stack)
        layers = stack.layers
        self._everybody = arguments["keep_mlp"]
        pair = {name: arguments[name] for name in ("delta", "residual")}
        attending = {**pair, "positions": arguments["positions"]}
        attentions = [(part, "keep_attention") for part in Tracer(attend, attending).trace(layers)]
        mlps = [(part, "keep_mlp") for part in Tracer(run_mlp, pair).trace(layers)]
        self._attend = [compiler.launch([part]) for part in attentions]
        self._mlp = [compiler.launch([part]) for part in mlps]
        self._block = [compiler.launch(both) for both in zip(attentions, mlps, strict=True)]
        alone = [index for index, layer in enumerate(layers) if layer.fills_alone]
        fills = Tracer(fill, attending).trace([layers[index] for index in alone])
        (norm,) = Tracer(final_norm, pair).trace([stack])
        self._final_norm = compiler.launch([(norm, None)])
        self._fill = {
            index: compiler.launch([(part, None)]) for index, part in zip(alone, fills, strict=True)
        }

    def attend(
        self,
        index: int,
        delta: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> Pair:
        """See `SubLayers.attend`."""
        keep = self._keep(keep, len(delta))
        delta, residual = self._attend[index](delta, residual, positions, keep, keep)
        return delta, residual

    def run_mlp(
        self, index: int, delta: torch.Tensor, residual: torch.Tensor, keep: torch.Tensor | None
    ) -> Pair:
        """See `SubLayers.run_mlp`."""
        keep = self._keep(keep, len(delta))
        delta, residual = self._mlp[index](delta, residual, keep, keep, keep)
        return delta, residual

    def block(
        self,
        index: int,
        delta: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        keep_attention: torch.Tensor | None,
        keep_mlp: torch.Tensor | None,
    ) -> Pair:
        """See `SubLayers.block`."""
        kept = (self._keep(keep, len(delta)) for keep in (keep_attention, keep_mlp))
        delta, residual = self._block[index](delta, residual, positions, *kept)
        return delta, residual

    def fill(
        self, index: int, delta: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """See `SubLayers.fill`."""
        launch = self._fill.get(index)
        if launch is None:
            super().fill(index, delta, residual, positions)
            return
        keep = self._keep(None, len(delta))
        launch(delta, residual, positions, keep, keep)

    def final_norm(self, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
        """See `SubLayers.final_norm`."""
        keep = self._keep(None, len(delta))
        _, _, normed = self._final_norm(delta, residual, keep, keep, keep)
        return normed, residual

    def _keep(self, keep: torch.Tensor | None, rows: int) -> torch.Tensor:
        if keep is not None:
            return keep
        if rows > len(self._everybody):
            self._everybody = self._everybody.new_ones((2 * rows, 1))
        return self._everybody[:rows]
