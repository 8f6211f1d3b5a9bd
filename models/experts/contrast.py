"""SCMoE (arXiv 2405.14507): a weak pass beside the strong one, and logits between the two.

The weak pass reads the same tokens through one lower-ranked expert per layer, with K/V of its own.
In a step its rows follow all others; its last row's logits meet the strong pass's before anything
else, penalties and sampling included, sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sluice.kernels.ops.contrast_logits import contrast_logits
from sluice.models.depth.masks import Segment
from sluice.models.policy.axes import IntArray
from sluice.models.policy.experts import Contrast

BlockIds = tuple[list[int], ...]


@dataclass(frozen=True, slots=True)
class WeakPasses:
    """The weak passes of a step, in row order.

    Attributes:
        owners: batch index of each pass's request, int64, (passes,).
        contrasts: how each is combined with its strong pass.
        blocks: K/V blocks of each, by cache group.
        sources: row of the strong pass that each weak row repeats, int64, (weak rows,).
        last: last row of each pass, int64, (passes,).
    """

    owners: IntArray
    contrasts: tuple[Contrast, ...]
    blocks: tuple[BlockIds, ...]
    sources: IntArray
    last: IntArray

    @classmethod
    def from_contrasts(
        cls,
        contrasts: Mapping[int, Contrast],
        blocks: Mapping[int, BlockIds],
        first_rows: IntArray,
        scheduled: IntArray,
        rows: int,
    ) -> WeakPasses:
        """Lay the weak rows out behind the step's other rows.

        Args:
            contrasts: by batch index, in order.
            blocks: K/V blocks of the weak passes by batch index.
            first_rows: first scheduled row of each request, (requests,).
            scheduled: tokens scheduled of each request, (requests,).
            rows: of the step without weak passes.
        """
        owners = np.array(list(contrasts), dtype=np.int64)
        sources = [first_rows[i] + np.arange(scheduled[i]) for i in contrasts]
        return cls(
            owners=owners,
            contrasts=tuple(contrasts.values()),
            blocks=tuple(blocks[index] for index in contrasts),
            sources=np.concatenate(sources),
            last=rows + np.cumsum(scheduled[owners]) - 1,
        )

    def segments(self, strong: Sequence[Segment], requests: int) -> list[Segment]:
        """Segments of the weak rows.

        Args:
            strong: of the step without weak passes.
            requests: in the batch; weak passes are numbered from there on.
        """
        return [
            segment._replace(request=requests + number, weak=True)
            for number, owner in enumerate(self.owners.tolist())
            for segment in strong
            if segment.request == owner
        ]

    def combined(self, strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
        """Logits of the requests. `strong`, `weak`: of the last rows, (passes, vocabulary)."""
        beta, alpha = (
            torch.tensor([getattr(c, name) for c in self.contrasts], device=strong.device)
            for name in ("beta", "alpha")
        )
        return contrast_logits(strong, weak, beta, alpha)
