"""Who looks on in a step: one watch per exit method and rule, one per prompt that decides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sluice.models.depth import mod
from sluice.models.depth.registry import PROMPT_METHODS, exit_method
from sluice.models.plan import IntArray
from sluice.models.policy import MissingKV
from sluice.models.profile import Profile
from sluice.models.step import RoutedStep
from sluice.models.watch import ExitWatch, PromptWatch, VoidWatch, Watch


class WatchFactory:
    """Makes the watches of each step; one instance per model runner."""

    def __init__(
        self, num_layers: int, block_size: int, profile: Profile | None, device: torch.device
    ) -> None:
        self._num_layers = num_layers
        self._block_size = block_size
        self._profile = profile
        self._device = device
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def of(self, step: RoutedStep) -> Iterator[Watch]:
        """Watches of the requests of a planned step."""
        yield from self._exit_watches(step)
        yield from self._mask_watches(step)

    def _exit_watches(self, step: RoutedStep) -> Iterator[Watch]:
        groups: dict[tuple[str, tuple[int, ...], MissingKV], list[int]] = {}
        for index, path in step.paths.items():
            rule = path.ticket.policy.exit
            if rule is None or step.live_row(index) is None:
                continue
            if path.pending is None or not path.pending.must_run_full_depth(
                step.last_position(index), self._block_size
            ):
                groups.setdefault((rule.method, rule.layers, rule.kv), []).append(index)
        for (name, layers, kv), indices in groups.items():
            method = exit_method(name)
            thresholds = np.zeros(len(indices), dtype=np.float32)
            rows = np.zeros(len(indices), dtype=np.int64)
            companions: dict[int, IntArray] = {}
            for place, index in enumerate(indices):
                path = step.paths[index]
                rule, row = path.ticket.policy.exit, step.live_row(index)
                assert rule is not None
                assert row is not None
                nth = step.last_position(index) - path.prompt_tokens
                thresholds[place] = method.threshold(rule, nth, path.max_tokens)
                rows[place] = row
                if path.pending is not None:
                    companions[row] = np.arange(row - len(path.pending.tokens), row)
            yield ExitWatch(
                frozenset(layers),
                method,
                self._tensors_of(name),
                rows,
                thresholds,
                self._num_layers - 1,
                companions if kv is MissingKV.RECOMPUTE else None,
            )

    def _mask_watches(self, step: RoutedStep) -> Iterator[Watch]:
        for index, path in step.paths.items():
            rule = path.ticket.policy.adaptive
            if rule is None or rule.method == mod.NAME:
                continue
            start = int(step.requests.computed[index])
            end = start + int(step.requests.scheduled[index])
            first_row = int(step.first_rows[index]) - start
            if rule.mode in ("readout", "replace"):
                fresh = np.arange(start, min(end, path.prompt_tokens))
                if step.live_row(index) is not None:
                    fresh = np.append(fresh, end - 1)
                if len(fresh):
                    yield VoidWatch(rule, first_row + fresh, self._num_layers)
                continue
            method = PROMPT_METHODS[rule.method]
            first = path.prompt_tokens - 1 if method.pool == "last" else path.counted
            fresh = np.arange(max(first, start), min(end, path.prompt_tokens))
            if not path.decided and len(fresh):
                tensors = self._tensors_of(rule.method)
                yield PromptWatch(path, method, tensors, first_row + fresh, self._num_layers)

    def _tensors_of(self, method: str) -> dict[str, torch.Tensor]:
        if method not in self._tensors:
            trained = self._profile.tensors(method) if self._profile else {}
            self._tensors[method] = {name: t.to(self._device) for name, t in trained.items()}
        return self._tensors[method]
