"""What the routers of one step did, summed up after it.

A sum per layer would cost as much as routing does. The layers' selections are kept instead, leave
for the host without anybody waiting, and are summed up in one pass when the next step begins or a
record is asked for.
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
        loaded: distinct experts run by a layer's rows, over layers.
        layers: how many layers routed.
    """

    ran: IntArray
    loaded: int
    layers: int


class StepLedger:
    """Selections of a step, layer by layer."""

    def __init__(self, tokens: int) -> None:
        """Open it for a step of `tokens` rows."""
        self._total = tokens
        self._places: list[int] = []
        self._tokens: list[IntArray] = []
        self._own: list[NDArray[np.bool_]] = []
        self._chosen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def write(self, place: int, tokens: IntArray, dropped: IntArray, chosen: Selection) -> None:
        """Note one layer's selection.

        Args:
            place: of the layer among those with experts.
            tokens: rows of the step that it is about, int64, (rows,).
            dropped: places of rows whose output is dropped: they do not count as the tokens' own.
            chosen: for these rows.
        """
        own = np.ones(len(tokens), dtype=np.bool_)
        own[dropped] = False
        self._own.append(own)
        self._places.append(place)
        self._tokens.append(tokens)
        self._chosen.append((_leaving(chosen.ids), _leaving(chosen.active), _leaving(chosen.taken)))

    def close(self, counts: IntArray) -> StepSums:
        """Add everything up.

        Args:
            counts: `ExpertCounters.total`, (layers, experts + 2), added to.
        """
        ran = np.zeros((self._total, 3), dtype=np.int64)
        if not self._chosen:
            return StepSums(ran, 0, 0)
        if self._chosen[0][0].is_pinned():
            torch.cuda.synchronize()
        parts = [[tensor.numpy() for tensor in chosen] for chosen in self._chosen]
        active, taken = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        lengths = [len(own) for own in self._tokens]
        widths = np.repeat([part[0].shape[1] for part in parts], lengths)
        starts = np.repeat(np.array(self._places) * counts.shape[1], lengths)
        ids = np.concatenate([part[0].ravel() for part in parts]) + np.repeat(starts, widths)
        slots = np.arange(len(ids)) - np.repeat(np.cumsum(widths) - widths, widths)
        selected = np.bincount(ids[slots < np.repeat(active, widths)], minlength=counts.size)
        counts += selected.reshape(counts.shape)
        # A layer runs once a step, so no place is named twice.
        counts[self._places, ROWS] += lengths
        counts[self._places, MASKED] += [part[2].sum() for part in parts]
        own = np.concatenate(self._own)
        tokens = np.concatenate(self._tokens)[own]
        for column, amounts in enumerate((active[own], taken[own], None)):
            ran[:, column] = np.bincount(tokens, amounts, minlength=self._total)
        return StepSums(ran, int(np.count_nonzero(selected)), len(self._places))


def _leaving(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, or a copy of it on its way there."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
