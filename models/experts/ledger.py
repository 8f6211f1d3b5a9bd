"""What the routers of one step did, summed up once at its end.

A sum per layer would cost as much as routing does; the layers' tensors are kept instead, and one
pass over all of them adds up the counters, the tokens' shares and the experts loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.kernels.route_topk import Selection
from sluice.models.expert_counters import MASKED, ROWS

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums of one step.

    Attributes:
        ran: int64, (tokens, 3), over layers: experts run, selections that a policy took away,
            routings (`sluice.models.experts.record`).
        loaded: int64, (2,): distinct experts run by a layer's rows, over layers, and layers.
    """

    ran: torch.Tensor
    loaded: torch.Tensor


class StepLedger:
    """Selections of a step, layer by layer."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._tokens: list[IntArray] = []
        self._chosen: list[Selection] = []

    def write(self, place: int, tokens: IntArray, chosen: Selection) -> None:
        """Note one layer's selection.

        Args:
            place: of the layer among those with experts.
            tokens: rows of the step that it is about, int64, (rows,).
            chosen: for these rows.
        """
        self._places.append(place)
        self._tokens.append(tokens)
        self._chosen.append(chosen)

    def close(self, tokens: int, counts: torch.Tensor) -> StepSums | None:
        """Add everything to `counts`; None if no router ran.

        Args:
            tokens: rows of the step.
            counts: int64, (layers, experts + 2), as in `ExpertCounters`.
        """
        if not self._chosen:
            return None
        device = counts.device
        lengths = [len(own) for own in self._tokens]
        widths = np.repeat([chosen.ids.shape[1] for chosen in self._chosen], lengths)
        places = torch.from_numpy(np.repeat(self._places, lengths)).to(device)
        active = torch.cat([chosen.active for chosen in self._chosen])
        taken = torch.cat([chosen.taken for chosen in self._chosen])
        ids = torch.cat([chosen.ids.reshape(-1) for chosen in self._chosen])

        row_of_slot = np.repeat(np.arange(len(widths)), widths)
        first_slots = np.cumsum(widths) - widths
        slot = torch.from_numpy(np.arange(len(row_of_slot)) - first_slots[row_of_slot]).to(device)
        row = torch.from_numpy(row_of_slot).to(device)
        used = (slot < active[row]).to(torch.int64)
        where = places[row] * counts.shape[1] + ids
        counts.view(-1).index_add_(0, where, used)
        counts[:, MASKED].index_add_(0, places, taken)
        counts[:, ROWS].index_add_(0, places, torch.ones_like(places))
        seen = torch.zeros(counts.numel(), dtype=torch.bool, device=device)
        seen[where] = True

        ran = torch.zeros((tokens, 3), dtype=torch.int64, device=device)
        rows = torch.from_numpy(np.concatenate(self._tokens)).to(device)
        ran.index_add_(0, rows, torch.stack([active, taken, torch.ones_like(active)], dim=1))
        layers = torch.tensor([len(self._places)], device=device)
        return StepSums(ran, torch.cat([seen.sum().view(1), layers]))
