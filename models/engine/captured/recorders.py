"""Who runs recorded launches: CUDA as graphs, a CPU as plain calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Launch = Callable[[], None]
"""Runs what was recorded, on the buffers that it was recorded with."""

_WARM_UPS = 2


class LaunchRecorder(Protocol):
    """Records functions that only read and write static buffers."""

    def record(self, run: Launch) -> Launch:
        """Give a function that does what `run` does."""


class DirectCalls:
    """Runs the function itself: on a CPU, where nothing can be captured."""

    def record(self, run: Launch) -> Launch:
        """See `LaunchRecorder.record`."""
        return run


class CudaGraphs:
    """Captures functions as CUDA graphs in one memory pool, on the current stream."""

    def __init__(self, pool: Any = None) -> None:
        """Capture into `pool` of `torch.cuda.graph_pool_handle`, or one of its own."""
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool

    def record(self, run: Launch) -> Launch:
        """See `LaunchRecorder.record`. Runs the function a few times."""
        # Libraries choose their kernels and get their workspaces at the first calls.
        for _ in range(_WARM_UPS):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, stream=torch.cuda.current_stream()):
            run()
        replay: Launch = graph.replay
        return replay


@dataclass(frozen=True, slots=True)
class Limits:
    """When capturing stops; what is not captured by then runs in the loop.

    Attributes:
        seconds: of capturing.
        memory: of the device, bytes, for all graphs together.
    """

    seconds: float
    memory: int


class Spending:
    """What capturing has cost so far."""

    def __init__(self, device: torch.device) -> None:
        """Begin to count."""
        self._device = device
        self._began = time.perf_counter()
        self._free = self._free_memory()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    @property
    def memory(self) -> int:
        """Of the device, bytes; 0 on a CPU."""
        return self._free - self._free_memory()

    def exceeds(self, limits: Limits) -> bool:
        """Whether one of them is reached."""
        return self.seconds >= limits.seconds or self.memory >= limits.memory

    def _free_memory(self) -> int:
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]
