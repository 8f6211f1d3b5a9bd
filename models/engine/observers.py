"""Observers: they look at the residual stream while a step's layers run, and decide.

An observer has some token rows of one step. The layer loop calls it around the layers it names.
What it decides acts at once through `LoopControl`, and is stored by its `commit` after the step.
The rules themselves are the depth methods' (`sluice.models.depth`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.models.depth.method import (
    ExitMethod,
    ExitPoint,
    PromptMethod,
    Tensors,
    TokenMethod,
)
from sluice.models.engine.request_state import RequestState
from sluice.models.policy.axes import BoolArray, IntArray
from sluice.models.policy.policy import AdaptiveRule


class LoopControl(Protocol):
    """What an observer may do to the rows of a running step."""

    def leave(self, tokens: IntArray, *, fill: bool) -> None:
        """Take rows out of all further layers; `fill`: write their K/V there."""

    def pass_over(self, tokens: IntArray) -> None:
        """Take rows out of the layer that is about to run, K/V and all."""

    def assign(self, tokens: IntArray, hidden: torch.Tensor) -> None:
        """Set the residual stream of rows, (rows, hidden)."""


@dataclass(frozen=True, slots=True)
class StepDecisions:
    """What the observers of a step decided about generated tokens, by row.

    Attributes:
        exits: last layer that the row ran.
        void: layers that were void for the row, bool, (layers,).
    """

    exits: dict[int, int] = field(default_factory=dict)
    void: dict[int, BoolArray] = field(default_factory=dict)


class LayerObserver(ABC):
    """Looks at `tokens` around some layers.

    Attributes:
        tokens: rows, ascending, int64; an observer drops those it is done with.
        layers: layers around which it is called.
        answers: rows that left, with their logits, (rows, vocabulary), if its test computed them.
    """

    needs_before = False
    """Whether `after_layer` wants the residual stream from before the layer too."""
    needs_logits = False
    """Whether `after_layer` wants the LM head's logits."""
    looks_ahead = False
    """Whether `before_layer` is to be called."""

    def __init__(self, tokens: IntArray, layers: frozenset[int]) -> None:
        self.tokens = tokens
        self.layers = layers
        self.answers: list[tuple[IntArray, torch.Tensor]] = []

    def before_layer(  # noqa: B027 - most observers only look back
        self, layer: int, before: torch.Tensor, control: LoopControl
    ) -> None:
        """Called with the residual stream of `tokens`, (rows, hidden)."""

    @abstractmethod
    def after_layer(
        self,
        layer: int,
        before: torch.Tensor | None,
        after: torch.Tensor,
        logits: torch.Tensor | None,
        control: LoopControl,
    ) -> None:
        """Called with the residual stream of `tokens`, (rows, hidden), and their logits."""

    def finish(self, control: LoopControl) -> None:  # noqa: B027 - most have nothing to add
        """Called after the last layer."""

    @abstractmethod
    def commit(self, decisions: StepDecisions) -> None:
        """Store what was decided, after the step: in `decisions`, or in the request's state."""


class ExitObserver(LayerObserver):
    """Generated tokens that run for the first time, under one exit method."""

    def __init__(
        self,
        layers: frozenset[int],
        method: ExitMethod,
        tensors: Tensors,
        tokens: IntArray,
        thresholds: NDArray[np.float32],
        last_layer: int,
        companions: Mapping[int, IntArray] | None = None,
    ) -> None:
        """Observe `tokens`, held against `thresholds`, (rows,).

        `companions` are pending rows that leave with a row, without K/V being filled.
        """
        super().__init__(tokens, layers)
        self.needs_before = method.needs_previous
        self.needs_logits = method.needs_logits
        self._all_tokens = tokens
        self._exits = np.full(len(tokens), last_layer, dtype=np.int64)
        self._method = method
        self._tensors = tensors
        self._thresholds = torch.from_numpy(thresholds)
        self._companions = companions
        self._index = np.arange(len(tokens))
        self._state: dict[str, torch.Tensor] = {}

    def after_layer(
        self,
        layer: int,
        before: torch.Tensor | None,
        after: torch.Tensor,
        logits: torch.Tensor | None,
        control: LoopControl,
    ) -> None:
        """See `LayerObserver.after_layer`."""
        point = ExitPoint(
            layer=layer,
            hidden=after,
            previous=before,
            logits=logits,
            threshold=self._thresholds.to(after.device),
            state=self._state,
            tensors=self._tensors,
        )
        leaving = agreed_between_ranks(self._method.leaves(point)).cpu().numpy()
        if not leaving.any():
            return
        self._exits[self._index[leaving]] = layer
        gone, stays = self.tokens[leaving], ~leaving
        if self._companions is None:
            control.leave(gone, fill=True)
        else:
            with_them = [self._companions[token] for token in gone.tolist()]
            control.leave(np.sort(np.concatenate([gone, *with_them])), fill=False)
        if logits is not None:
            self.answers.append((gone, logits[torch.from_numpy(leaving).to(logits.device)]))
        self.tokens, self._index = self.tokens[stays], self._index[stays]
        kept = torch.from_numpy(stays)
        self._thresholds = self._thresholds[kept]
        self._state = {name: value[kept.to(value.device)] for name, value in self._state.items()}

    def commit(self, decisions: StepDecisions) -> None:
        """See `LayerObserver.commit`."""
        exits = zip(self._all_tokens.tolist(), self._exits.tolist(), strict=True)
        decisions.exits.update(exits)


class PromptObserver(LayerObserver):
    """Prompt tokens of one request whose mask is decided from them."""

    needs_before = True

    def __init__(
        self,
        state: RequestState,
        method: PromptMethod,
        tensors: Tensors,
        tokens: IntArray,
        num_layers: int,
    ) -> None:
        super().__init__(tokens, frozenset(range(num_layers)))
        rule = state.extra.policy.adaptive
        assert rule is not None
        self.looks_ahead = method.masks_prompt(rule)
        self._rule: AdaptiveRule = rule
        self._request = state
        self._method = method
        self._tensors = tensors
        self._passed = np.zeros(num_layers, dtype=np.bool_)

    def before_layer(self, layer: int, before: torch.Tensor, control: LoopControl) -> None:
        """With a masked prefill the whole prompt is here: decide the layer before it runs."""
        read = self._method.statistic(layer, before, before, self._tensors)
        self._request.statistics[layer] = float(agreed_between_ranks(read.double().mean()))
        skipped = self._method.skipped_blocks(self._request.statistics, self._rule)
        self._passed[layer] = skipped[layer]
        if skipped[layer]:
            control.pass_over(self.tokens)

    def after_layer(
        self,
        layer: int,
        before: torch.Tensor | None,
        after: torch.Tensor,
        logits: torch.Tensor | None,  # noqa: ARG002
        control: LoopControl,  # noqa: ARG002
    ) -> None:
        """Pool the layer's statistic."""
        if self.looks_ahead:
            return
        assert before is not None
        read = self._method.statistic(layer, before, after, self._tensors)
        total = agreed_between_ranks(read.double().sum())
        if self._method.pool == "mean":
            self._request.statistics[layer] += float(total)
        else:
            self._request.statistics[layer] = float(total)

    def commit(self, decisions: StepDecisions) -> None:  # noqa: ARG002
        """Decide the request's mask, if all of its prompt has been read."""
        state = self._request
        state.counted += len(self.tokens)
        if self._method.pool == "mean" and state.counted < state.prompt_tokens:
            return
        if self.looks_ahead:
            state.decide_prompt(self._passed, masked_prefill=True)
            return
        count = state.prompt_tokens if self._method.pool == "mean" else 1
        skipped = self._method.skipped_blocks(state.statistics / count, self._rule)
        state.decide_prompt(skipped, masked_prefill=False)


class VoidLayerObserver(LayerObserver):
    """Tokens of one request under a method that says which of their layers were void."""

    needs_before = True

    def __init__(
        self,
        rule: AdaptiveRule,
        method: TokenMethod,
        tensors: Tensors,
        tokens: IntArray,
        num_layers: int,
    ) -> None:
        super().__init__(tokens, frozenset(range(num_layers)))
        self._void = np.zeros((len(tokens), num_layers), dtype=np.bool_)
        self._rule = rule
        self._method = method
        self._tensors = tensors
        self._state: dict[str, torch.Tensor] = {}
        self._latest: torch.Tensor | None = None

    def after_layer(
        self,
        layer: int,
        before: torch.Tensor | None,
        after: torch.Tensor,
        logits: torch.Tensor | None,  # noqa: ARG002
        control: LoopControl,
    ) -> None:
        """Test the layer, and undo it where it is void if the method replaces."""
        assert before is not None
        void = agreed_between_ranks(
            self._method.void(layer, before, after, self._rule, self._state, self._tensors)
        )
        self._void[:, layer] = void.cpu().numpy()
        if self._method.replaces:
            if self._void[:, layer].any():
                control.assign(self.tokens, torch.where(void[:, None], before, after))
            return
        latest = before if self._latest is None else self._latest
        self._latest = torch.where(void[:, None], latest, after)

    def finish(self, control: LoopControl) -> None:
        """Unless the method replaces, hand the last non-void layer's output to the final norm."""
        if not self._method.replaces and self._latest is not None:
            control.assign(self.tokens, self._latest)

    def commit(self, decisions: StepDecisions) -> None:
        """See `LayerObserver.commit`."""
        decisions.void.update(zip(self.tokens.tolist(), self._void, strict=True))


def agreed_between_ranks(value: torch.Tensor) -> torch.Tensor:
    """`value` of the first tensor-parallel rank: floats may differ between ranks, masks may not."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return value
    shared: torch.Tensor = group.broadcast(value.to(torch.float64).contiguous(), src=0)
    return shared.to(value.dtype)
