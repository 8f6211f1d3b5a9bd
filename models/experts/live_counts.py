"""Where routers count vLLM's own selections, and how the counts reach the counter file.

On a CPU the routers add to the file's memory. On another device they add to a tensor there, which
is copied beside the steps and added to the file once a copy has arrived: nobody waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sluice.models.expert_counters import ROWS, ExpertCounters


class LiveCounts:
    """Counts of vLLM's own selections; one instance per model runner."""

    def __init__(self, counters: ExpertCounters, device: torch.device) -> None:
        self._counters = counters
        self._counts = torch.from_numpy(counters.total)
        self._host: torch.Tensor | None = None
        if device.type != "cpu":
            self._counts = self._counts.to(device)
            self._host = torch.zeros_like(self._counts, device="cpu", pin_memory=True)
            cuda: Any = torch.cuda  # Its classes have no types.
            self._arrived = cuda.Event()
            self._added = np.zeros_like(counters.total)
        self._ones = torch.ones(0, dtype=torch.int64, device=device)

    def add(self, place: int, ids: torch.Tensor) -> None:
        """Count selections.

        Args:
            place: of the layer among those with experts.
            ids: int32, (rows, k).
        """
        flat = ids.reshape(-1)
        if len(self._ones) < len(flat):
            self._ones = torch.ones(len(flat), dtype=torch.int64, device=flat.device)
        counts = self._counts[place]
        counts.index_add_(0, flat, self._ones[: len(flat)])
        counts[ROWS] += len(ids)

    def publish(self) -> None:
        """Bring the file up to date with what has arrived; called once a step."""
        if self._host is None or not self._arrived.query():
            return
        arrived = self._host.numpy()
        self._counters.total += arrived - self._added
        self._added[:] = arrived
        self._host.copy_(self._counts, non_blocking=True)
        self._arrived.record()
