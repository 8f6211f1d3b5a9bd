"""What the engine's routers dispatch, token by token: recorded where vLLM's kernels read it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

Weights = dict[int, float]
"""Experts that run a token, with their weights."""


class Dispatch:
    """Selections by record key, layer with experts and position.

    Attributes:
        strong: of the requests with a policy.
        weak: of their weak passes.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._step: Any = None
        self._positions: Any = None
        self.strong: dict[str, dict[tuple[int, int], Weights]] = defaultdict(dict)
        self.weak: dict[str, dict[tuple[int, int], Weights]] = defaultdict(dict)

    def run(self, stock: Any, step: Any, positions: torch.Tensor, *rest: Any) -> Any:
        """Stands before `LayerLoop.run`."""
        scheduled = positions.numpy()
        shape = step.plan.shape
        self._positions = np.full(len(shape.requests), -1)
        self._positions[shape.scheduled] = scheduled
        if step.weak is not None:
            sources = step.weak.sources
            self._positions[-len(sources) :] = self._positions[sources]
        self._step = step
        try:
            return stock(step, positions, *rest)
        finally:
            self._step = None

    def route(self, stock: Any, moe_index: int, logits: torch.Tensor, own: Any) -> Any:
        """Stands before `ExpertRouter.route`."""
        weights, ids = stock(moe_index, logits, own)
        call = self._runner.routed.router._call
        if self._step is not None and call is not None:
            for row, token in enumerate(call.tokens.tolist()):
                self._keep(moe_index, token, ids[row].tolist(), weights[row].tolist())
        return weights, ids

    def _keep(self, moe_index: int, token: int, ids: list[int], weights: list[float]) -> None:
        step = self._step
        requests = len(step.requests.ids)
        number = int(step.plan.shape.requests[token])
        owner = number if number < requests else int(step.weak.owners[number - requests])
        state = step.states.get(owner)
        if state is None:
            return
        chosen: Weights = {}
        for expert, weight in zip(ids, weights, strict=True):
            # An unused slot repeats an expert with weight 0.
            chosen[expert] = chosen.get(expert, 0.0) + weight
        kept = self.strong if number < requests else self.weak
        kept[state.extra.request_key][moe_index, int(self._positions[token])] = chosen


class Watcher(Protocol):
    """Stands before `LayerLoop.run` and `ExpertRouter.route`; `stock` is what it stands before."""

    def run(self, stock: Any, *args: Any) -> Any: ...

    def route(self, stock: Any, *args: Any) -> Any: ...


W = TypeVar("W", bound=Watcher)


@contextmanager
def standing_before(runner: Any, watcher: W) -> Iterator[W]:
    """Let a watcher see what an engine's loop and routers are given and give."""
    loop, router = runner.routed.loop, runner.routed.router
    run, route = loop.run, router.route
    loop.run = lambda *args: watcher.run(run, *args)
    router.route = lambda *args: watcher.route(route, *args)
    try:
        yield watcher
    finally:
        del loop.run, router.route


def recorded(runner: Any) -> AbstractContextManager[Dispatch]:
    """Record what an engine's routers dispatch."""
    return standing_before(runner, Dispatch(runner))
