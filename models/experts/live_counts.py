"""Where routers count vLLM's own selections, and how the counts reach the counter file.

On a CPU the routers add to the file's memory. On another device they add to a tensor there, which
is copied beside the steps and added to the file once a copy has arrived: nobody waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sluice.kernels.count_selections import count_selections
from sluice.kernels.route_rows import RouteCounts
from sluice.models.expert_counters import ExpertCounters


class LiveCounts:
    """Counts of vLLM's own selections; one instance per model runner."""

    def __init__(self, counters: ExpertCounters, device: torch.device) -> None:
        self._counters = counters
        total = torch.from_numpy(counters.total)
        self._host: torch.Tensor | None = None
        if device.type != "cpu":
            total = total.to(device)
            self._host = torch.zeros_like(total, device="cpu", pin_memory=True)
            cuda: Any = torch.cuda  # Its classes have no types.
            self._arrived = cuda.Event()
            self._added = np.zeros_like(counters.total)
        # Nothing is counted by token.
        self._counts = RouteCounts(total, total.new_empty((0, 3)))
        self._owners = total.new_empty(0)

    def add(self, place: int, ids: torch.Tensor) -> None:
        """Count selections.

        Args:
            place: of the layer among those with experts.
            ids: int32, (rows, k).
        """
        count_selections(ids, self._owners, self._counts, place)

    def publish(self) -> None:
        """Bring the file up to date with what has arrived; called once a step."""
        if self._host is None or not self._arrived.query():
            return
        arrived = self._host.numpy()
        self._counters.total += arrived - self._added
        self._added[:] = arrived
        self._host.copy_(self._counts.histogram, non_blocking=True)
        self._arrived.record()
