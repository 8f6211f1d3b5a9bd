"""What the routers did, counted on the device while they route.

Counts of a step with controls (`RoutingCounts`) are copied to the host when the step ends, and read
when the next step begins or a record is asked for. vLLM's own selections in all other steps
(`StockCounts`) go to the counter file: on a CPU the routers add to the file's memory; on another
device they add to a tensor there, which is copied beside the steps and added once a copy has
arrived. Neither makes a step wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sluice.kernels.ops.route_topk import count_selections
from sluice.kernels.ops.router_config import EXTRA, ROWS
from sluice.kernels.ops.routing_args import SelectionCounts
from sluice.models.policy.axes import IntArray
from sluice.models.telemetry.expert_counters import ExpertCounters


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step.

    Attributes:
        ran: int64, (tokens, 3), over layers; columns as in `SelectionCounts.by_token`.
        loaded: distinct experts run by a layer's rows, over layers.
        layers: how many layers routed.
    """

    ran: IntArray
    loaded: int
    layers: int


class RoutingCounts:
    """Counts of a step.

    Attributes:
        tensors: where its routers count.
    """

    def __init__(self, tokens: int, layers: int, experts: int, device: torch.device) -> None:
        """Begin at zero.

        Args:
            tokens: rows of the step.
            layers: with experts.
            experts: of a layer.
            device: of the model.
        """
        self.tensors = SelectionCounts(
            histogram=torch.zeros((layers, experts + EXTRA), dtype=torch.int64, device=device),
            by_token=torch.zeros((tokens, 3), dtype=torch.int64, device=device),
        )
        self._host: list[torch.Tensor] = list(self.tensors.tensors)
        self._arrived: Any = None

    def send(self) -> None:
        """Send the counts to the host: the step has been launched."""
        if self.tensors.histogram.device.type == "cpu":
            return
        self._host = [
            torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
            for part in self.tensors.tensors
        ]
        cuda: Any = torch.cuda  # Its classes have no types.
        self._arrived = cuda.Event()
        self._arrived.record()

    def close(self, total: IntArray) -> StepSums:
        """Add the histogram up; once.

        Args:
            total: `ExpertCounters.total`, (layers, experts + 2), added to.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        histogram, by_token = (part.numpy() for part in self._host)
        total += histogram
        loaded = int(np.count_nonzero(histogram[:, :-EXTRA]))
        return StepSums(by_token, loaded, int(np.count_nonzero(histogram[:, ROWS])))


class StockCounts:
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
        self._counts = SelectionCounts(histogram=total, by_token=total.new_empty((0, 3)))
        self._no_tokens = total.new_empty(0)

    def add(self, moe_index: int, ids: torch.Tensor) -> None:
        """Count selections.

        Args:
            moe_index: the layer's place among those with experts.
            ids: int32, (rows, k).
        """
        count_selections(ids, self._no_tokens, self._counts, moe_index)

    def publish(self) -> None:
        """Bring the file up to date with what has arrived; called once a step."""
        if self._host is None or not self._arrived.query():
            return
        arrived = self._host.numpy()
        self._counters.total += arrived - self._added
        self._added[:] = arrived
        self._host.copy_(self._counts.histogram, non_blocking=True)
        self._arrived.record()
