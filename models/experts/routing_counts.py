"""What the routers did, counted on the device while they route.

Counts of a step with controls (`RoutingCounts`) are copied to the host when the step ends, and read
with the step's output. vLLM's own selections in all other steps (`StockCounts`) add up in one
tensor, which is copied now and then. Neither makes a step wait.
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


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step.

    Attributes:
        ran: int64, (tokens, 3), over layers; columns as in `SelectionCounts.by_token`.
        selections: int64, (layers, experts + 2), columns as in `SelectionCounts.histogram`.
        loaded: distinct experts run by a layer's rows, over layers.
        layers: how many layers routed.
    """

    ran: IntArray
    selections: IntArray
    loaded: int
    layers: int


class HostCopy:
    """A copy of tensors on its way to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Begin to copy what the tensors hold once what is launched has run."""
        if tensors[0].device.type == "cpu":
            self._host = [tensor.clone() for tensor in tensors]
            self._arrived: Any = None
            return
        self._host = [
            torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        cuda: Any = torch.cuda  # Its classes have no types.
        self._arrived = cuda.Event()
        self._arrived.record()

    def read(self) -> list[IntArray]:
        """Wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._host]


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
        self._sent: HostCopy | None = None

    def send(self) -> None:
        """Send the counts to the host: the step has been launched."""
        self._sent = HostCopy(*self.tensors.tensors)

    def read(self) -> StepSums:
        """Wait for what was sent, and add it up."""
        assert self._sent is not None
        histogram, by_token = self._sent.read()
        loaded = int(np.count_nonzero(histogram[:, :-EXTRA]))
        return StepSums(by_token, histogram, loaded, int(np.count_nonzero(histogram[:, ROWS])))


class Selections:
    """Selections between two copies."""

    def __init__(self, now: HostCopy, before: HostCopy | None) -> None:
        self._now = now
        self._before = before

    def read(self) -> IntArray:
        """Wait for them; int64, (layers, experts + 2)."""
        (total,) = self._now.read()
        if self._before is None:
            return total
        (before,) = self._before.read()
        return total - before


class StockCounts:
    """Counts of vLLM's own selections; one instance per model runner."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        """Begin at zero; arguments as in `RoutingCounts`."""
        total = torch.zeros((layers, experts + EXTRA), dtype=torch.int64, device=device)
        # Nothing is counted by token.
        self._counts = SelectionCounts(histogram=total, by_token=total.new_empty((0, 3)))
        self._no_tokens = total.new_empty(0)
        self._sent: HostCopy | None = None

    def add(self, moe_index: int, ids: torch.Tensor) -> None:
        """Count selections.

        Args:
            moe_index: the layer's place among those with experts.
            ids: int32, (rows, k).
        """
        count_selections(ids, self._no_tokens, self._counts, moe_index)

    def send(self) -> Selections:
        """Send what was counted since the last time to the host."""
        before, self._sent = self._sent, HostCopy(self._counts.histogram)
        return Selections(self._sent, before)
