"""What looks on, and steps in, while the plain model runs layer after layer.

A pass runs one sequence. `ran` says which sub-layers run at which positions, bool, (positions,
layers, 2), attention first; a watch may change it for layers still to come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sluice.models.policy.policy import AdaptiveRule, ExitRule

from .exits import ExitTest
from .prompts import (
    VoidWalk,
    first_probability,
    mean_cosines,
    mod_tokens,
    similar_blocks,
    void_blocks,
)


class Watch:
    """Sees the residual stream before and after each layer, (positions, hidden)."""

    def __init__(self) -> None:
        self.margin = math.inf

    def entered(self, layer: int, before: Tensor, ran: Tensor) -> None:
        """Before a layer."""

    def passed(self, layer: int, before: Tensor, after: Tensor, ran: Tensor) -> Tensor:
        """After a layer: what goes on."""
        return after


class States(Watch):
    """Keeps the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self._states: list[Tensor] = []

    def passed(self, layer: int, before: Tensor, after: Tensor, ran: Tensor) -> Tensor:
        self._states += [after] if self._states else [before, after]
        return after

    @property
    def states(self) -> Tensor:
        """(layers + 1, positions, hidden), the embeddings first."""
        return torch.stack(self._states)


class ExitWatch(Watch):
    """The newest position may leave."""

    def __init__(self, rule: ExitRule, test: ExitTest) -> None:
        super().__init__()
        self._rule, self._test = rule, test
        self.left: int | None = None

    def passed(self, layer: int, before: Tensor, after: Tensor, ran: Tensor) -> Tensor:
        if (
            self.left is None
            and layer in self._rule.layers
            and self._test.leaves(self._test.score(before[-1], after[-1]))
        ):
            self.left = layer
            ran[-1, layer + 1 :] = False
        self.margin = self._test.margin
        return after


class FirstWatch(Watch):
    """FiRST's routers on the prompt."""

    def __init__(self, rule: AdaptiveRule, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._rule, self._heads = rule, heads
        self.mask: set[int] = set()

    def entered(self, layer: int, before: Tensor, ran: Tensor) -> None:
        threshold = self._rule.number("threshold")
        keep = first_probability(layer, before, self._heads)
        self.margin = min(self.margin, abs(keep - threshold))
        if keep < threshold:
            self.mask.add(layer)
            if self._rule.get("masked_prefill"):
                ran[:, layer] = False


class PoolWatch(States):
    """Masks read from a prompt that ran at full depth."""

    def __init__(self, rule: AdaptiveRule) -> None:
        super().__init__()
        self._rule = rule

    @property
    def mask(self) -> frozenset[int]:
        """Blocks that generated tokens leave out."""
        if self._rule.method == "similarity":
            mask, self.margin = similar_blocks(mean_cosines(self.states), self._rule)
        else:
            mask, self.margin = void_blocks(self.states, self._rule)
        return mask


class VoidWatch(Watch):
    """LAC's `readout` and `replace`, on prompt and generated tokens alike."""

    def __init__(self, rule: AdaptiveRule, layers: int) -> None:
        super().__init__()
        self._alpha, self._last = rule.number("threshold"), layers - 1
        self._replace = rule.get("mode") == "replace"
        self.voids: list[Tensor] = []

    def entered(self, layer: int, before: Tensor, ran: Tensor) -> None:
        if layer == 0:
            self._walk = VoidWalk(self._alpha, before)

    def passed(self, layer: int, before: Tensor, after: Tensor, ran: Tensor) -> Tensor:
        void = self._walk.void(before, after)
        self.voids.append(void)
        # A readout of any but the newest position is never read.
        gaps = self._walk.gaps[-1].abs()
        self.margin = min(self.margin, float((gaps if self._replace else gaps[-1:]).min()))
        if self._replace:
            return torch.where(void[:, None], before, after)
        return self._walk.active if layer == self._last else after


class ModWatch(Watch):
    """Mixture-of-Depths: each layer runs a share of the prompt."""

    def __init__(self, rule: AdaptiveRule, layers: int) -> None:
        super().__init__()
        self._rule, self._layers = rule, layers

    def entered(self, layer: int, before: Tensor, ran: Tensor) -> None:
        if layer == 0:
            kept = mod_tokens(before, self._layers, self._rule.numbers("retention"))
            for each, tokens in enumerate(kept):
                ran[[i for i in range(len(before)) if i not in tokens], each] = False
