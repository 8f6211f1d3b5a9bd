"""Tokens whose skip set has a trained adapter: their residual stream is corrected on the way."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sluice.models.depth.stream_adapter import StreamAdapter
from sluice.models.engine.observers import LayerObserver, LoopControl, StepDecisions
from sluice.models.policy.axes import IntArray


class AdapterObserver(LayerObserver):
    """Applies the adapters of one name to the tokens that ask for it."""

    def __init__(self, tokens: IntArray, adapters: Mapping[int, StreamAdapter]) -> None:
        """Act on `tokens`; `adapters` by the layer after which each acts."""
        super().__init__(tokens, frozenset(adapters))
        self._adapters = adapters

    def after_layer(
        self,
        layer: int,
        before: torch.Tensor | None,  # noqa: ARG002
        after: torch.Tensor,
        logits: torch.Tensor | None,  # noqa: ARG002
        control: LoopControl,
    ) -> None:
        """Correct the state; every rank has all of it and does the same."""
        control.assign(self.tokens, self._adapters[layer](after))

    def commit(self, decisions: StepDecisions) -> None:
        """Nothing was decided."""
