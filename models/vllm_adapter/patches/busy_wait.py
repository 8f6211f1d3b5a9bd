"""Seam: how the processes of an engine on a CPU wait for each other's messages.

Replaces `SpinCondition.wait` of vLLM's `shm_broadcast`. With it the engine core and its worker
spin for a second after each message before they sleep, so that an engine which serves keeps two
cores busy with waiting. On a machine with two cores, the API server and its clients then get none
for a second or two at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sluice.models.vllm_adapter.patching import wrap_once

_SPIN_SECONDS = 0.002
"""Long enough for what follows at once; to wake up takes some 0.1 ms."""
_LOOK_MS = 1
"""The message that wakes a reader may be lost; vLLM would look again after five seconds."""


def install() -> None:
    """Have readers sleep where the model runs on the cores that they would spin on.

    Raises:
        SeamMovedError: vLLM waits in another way.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wrap_once(SpinCondition, "wait", _sleeping)


def _sleeping(stock: Callable[[Any, int | None], None]) -> Callable[..., None]:
    def wait(condition: Any, timeout_ms: int | None = None) -> None:
        spinning = condition.busy_loop_s
        waited = time.monotonic() - condition.last_read
        if not _SPIN_SECONDS < waited <= spinning:
            stock(condition, timeout_ms)
            return
        condition.busy_loop_s = 0.0
        try:
            stock(condition, _LOOK_MS if timeout_ms is None else min(timeout_ms, _LOOK_MS))
        finally:
            condition.busy_loop_s = spinning

    return wait
