"""Which waiting request joins the running ones next: `sluice serve --group-by-depth SECONDS`.

A step runs a layer if one of its rows needs it, and while decoding is bound by reading weights a
row that skips the layer then saves nothing. So where more requests wait than fit, those go first
that leave out what the running ones leave out. This is the scheduler's only choice that pays: to
split the running requests into steps of one depth each reads the layers they share twice.

Named by vLLM's `scheduler_cls`. vLLM tells the function that stands for the class nothing of its
own, so the bound comes in the environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from sluice.models.engine.runners.base import check_seams
from sluice.models.engine.runners.seams import SCHEDULER
from sluice.models.engine.workers import GROUP_BY_DEPTH_ENV
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import Phase

_WINDOW = 64
"""Waiting requests that are looked at."""

SkippedSubLayers = frozenset[tuple[str, int]]
_NOTHING: SkippedSubLayers = frozenset()


class DepthQueue(FCFSRequestQueue):
    """Waiting requests: oldest first, but those that fit the running ones may overtake.

    A request that was preempted is next in any case.
    """

    def __init__(self, running: Callable[[], Iterable[Request]], patience: float) -> None:
        """Start empty.

        Args:
            running: gives the requests that run.
            patience: seconds for which a waiting request may be overtaken.
        """
        super().__init__()
        self._running = running
        self._patience = patience
        self._peeked: Request | None = None
        self._skipped_by = lru_cache(maxsize=4096)(_skipped_by)

    def peek_request(self) -> Request:
        """The request that is next, which `pop_request` then takes.

        Raises:
            IndexError: nobody waits.
        """
        self._peeked = self._next()
        return self._peeked

    def pop_request(self) -> Request:
        """Take the request that is next.

        Raises:
            IndexError: nobody waits.
        """
        peeked, self._peeked = self._peeked, None
        request = peeked if peeked is not None and peeked in self else self._next()
        self.remove(request)
        return request

    def _next(self) -> Request:
        window = [*islice(self, _WINDOW)]
        if not window:
            raise IndexError("nobody waits")
        preempted = next((request for request in window if request.num_preemptions), None)
        if preempted is not None:
            return preempted
        oldest = min(window, key=lambda request: request.arrival_time)
        running = [self._skipped(request) for request in self._running()]
        if not running or time.time() - oldest.arrival_time > self._patience:
            return oldest
        shared = frozenset.intersection(*running)
        return min(window, key=lambda request: len(shared ^ self._skipped(request)))

    def _skipped(self, request: Request) -> SkippedSubLayers:
        sampling = request.sampling_params
        text = None if sampling is None else (sampling.extra_args or {}).get(EXTRA_ARGS_KEY)
        return _NOTHING if text is None else self._skipped_by(text)


def grouping_scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """The scheduler vLLM would have built, with a `DepthQueue` for the requests that wait."""
    check_seams(SCHEDULER)
    asynchronous = vllm_config.scheduler_config.async_scheduling
    scheduler = (AsyncScheduler if asynchronous else Scheduler)(vllm_config, **arguments)
    patience = float(os.environ[GROUP_BY_DEPTH_ENV])
    scheduler.waiting = DepthQueue(lambda: scheduler.running, patience)
    return scheduler


def _skipped_by(text: str) -> SkippedSubLayers:
    """Sub-layers that no generated token of a policy runs, whatever it decides on the way."""
    skip = RoutingExtraArgs.decode(text).policy.skip
    if skip.phase is Phase.PREFILL:
        return _NOTHING
    return frozenset([*(("attention", n) for n in skip.attention), *(("mlp", n) for n in skip.mlp)])
