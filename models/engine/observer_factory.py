"""Which observers look at a step: one per exit rule or adapter that its requests share, or one
per request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

import numpy as np
import torch

from sluice.models.depth.method import PromptMethod, PromptTokenMethod, TokenMethod
from sluice.models.depth.registry import adaptive_method, exit_method
from sluice.models.depth.stream_adapter import StreamAdapter
from sluice.models.engine.adapter_observer import AdapterObserver
from sluice.models.engine.observers import (
    ExitObserver,
    LayerObserver,
    PromptObserver,
    VoidLayerObserver,
)
from sluice.models.engine.step import RoutedStep
from sluice.models.policy.axes import IntArray
from sluice.models.policy.policy import MissingKV, Phase
from sluice.models.profile.profile import Profile


class ObserverFactory:
    """Makes the observers of each step; one instance per model runner."""

    def __init__(
        self, num_layers: int, block_size: int, profile: Profile | None, device: torch.device
    ) -> None:
        self._num_layers = num_layers
        self._block_size = block_size
        self._profile = profile
        self._device = device
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._adapters: dict[str, dict[int, StreamAdapter]] = {}

    def observers(self, step: RoutedStep) -> Iterator[LayerObserver]:
        """Observers of the requests of a planned step."""
        yield from self._exit_observers(step)
        yield from self._mask_observers(step)
        yield from self._adapter_observers(step)

    def _exit_observers(self, step: RoutedStep) -> Iterator[LayerObserver]:
        groups: dict[tuple[str, tuple[int, ...], MissingKV], list[int]] = {}
        for index, state in step.states.items():
            rule = state.extra.policy.exit
            if rule is None or step.new_token_row(index) is None:
                continue
            if state.history is not None and not state.history.tests_next:
                continue
            if state.pending is None or not state.pending.must_run_full_depth(
                step.last_position(index), self._block_size
            ):
                groups.setdefault((rule.method, rule.layers, rule.kv), []).append(index)
        for (name, layers, kv), indices in groups.items():
            method = exit_method(name)
            thresholds = np.zeros(len(indices), dtype=np.float32)
            rows = np.zeros(len(indices), dtype=np.int64)
            companions: dict[int, IntArray] = {}
            for place, index in enumerate(indices):
                state = step.states[index]
                rule, row = state.extra.policy.exit, step.new_token_row(index)
                assert rule is not None
                assert row is not None
                nth = step.last_position(index) - state.prompt_tokens
                thresholds[place] = method.threshold(rule, nth, state.max_tokens)
                rows[place] = row
                if state.pending is not None:
                    companions[row] = np.arange(row - len(state.pending.tokens), row)
            yield ExitObserver(
                frozenset(layers),
                method,
                self._tensors_of(name),
                rows,
                thresholds,
                self._num_layers - 1,
                companions if kv is MissingKV.RECOMPUTE else None,
            )

    def _mask_observers(self, step: RoutedStep) -> Iterator[LayerObserver]:
        for index, state in step.states.items():
            rule = state.extra.policy.adaptive
            if rule is None:
                continue
            tensors = self._tensors_of(rule.method)
            span = step.positions(index)
            start, end = span.start, span.stop
            match adaptive_method(rule):
                case PromptTokenMethod():
                    continue  # Its masks were there before the prompt ran.
                case TokenMethod() as method:
                    fresh = np.arange(start, min(end, state.prompt_tokens))
                    if step.new_token_row(index) is not None:
                        fresh = np.append(fresh, end - 1)
                    if len(fresh):
                        rows = step.rows(index, fresh)
                        yield VoidLayerObserver(rule, method, tensors, rows, self._num_layers)
                case PromptMethod() as method:
                    first = state.prompt_tokens - 1 if method.pool == "last" else state.counted
                    fresh = np.arange(max(first, start), min(end, state.prompt_tokens))
                    if not state.decided and len(fresh):
                        rows = step.rows(index, fresh)
                        yield PromptObserver(state, method, tensors, rows, self._num_layers)
                case method:
                    assert_never(method)

    def _adapter_observers(self, step: RoutedStep) -> Iterator[AdapterObserver]:
        groups: dict[str, list[IntArray]] = {}
        for index, state in step.states.items():
            skip = state.extra.policy.skip
            if not skip.adapter:
                continue
            own = np.array(step.positions(index))
            if skip.phase is not Phase.BOTH:
                own = own[(own >= state.prompt_tokens) == (skip.phase is Phase.DECODE)]
            if len(own):
                groups.setdefault(skip.adapter, []).append(step.rows(index, own))
        for name, rows in groups.items():
            yield AdapterObserver(np.sort(np.concatenate(rows)), self._adapter(name))

    def _adapter(self, name: str) -> dict[int, StreamAdapter]:
        if name not in self._adapters:
            assert self._profile is not None
            adapters = self._profile.adapters(name)
            self._adapters[name] = {
                layer: adapter.to(self._device) for layer, adapter in adapters.items()
            }
        return self._adapters[name]

    def _tensors_of(self, method: str) -> dict[str, torch.Tensor]:
        if method not in self._tensors:
            trained = self._profile.tensors(method) if self._profile else {}
            self._tensors[method] = {name: t.to(self._device) for name, t in trained.items()}
        return self._tensors[method]
