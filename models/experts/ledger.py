"""What the routers of one step did.

The routing operations count on the device while they route. The sums leave for the host when the
step ends, without anybody waiting, and are read when the next step begins or a record is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.route_columns import EXTRA, ROWS
from sluice.kernels.route_rows import RouteCounts

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step.

    Attributes:
        ran: int64, (tokens, 3), over layers; columns as in `sluice.kernels.route_columns`.
        loaded: distinct experts run by a layer's rows, over layers.
        layers: how many layers routed.
    """

    ran: IntArray
    loaded: int
    layers: int


class StepLedger:
    """Counts of a step.

    Attributes:
        counts: where its routers count.
    """

    def __init__(self, tokens: int, layers: int, experts: int, device: torch.device) -> None:
        """Open it for a step of `tokens` rows and a model's layers with experts."""
        self.counts = RouteCounts(
            torch.zeros((layers, experts + EXTRA), dtype=torch.int64, device=device),
            torch.zeros((tokens, 3), dtype=torch.int64, device=device),
        )
        self._host: list[torch.Tensor] = list(self.counts)
        self._arrived: Any = None

    def leave(self) -> None:
        """Send the counts to the host: the step has been launched."""
        if self.counts.histogram.device.type == "cpu":
            return
        self._host = [
            torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
            for part in self.counts
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
        histogram, ran = (part.numpy() for part in self._host)
        total += histogram
        loaded = int(np.count_nonzero(histogram[:, :-EXTRA]))
        return StepSums(ran, loaded, int(np.count_nonzero(histogram[:, ROWS])))
