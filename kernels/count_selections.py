"""Selections of a router counted by expert and by token."""

from __future__ import annotations

import torch

from sluice.kernels.dispatch import operation
from sluice.kernels.route_columns import ACTIVE, MASKED, ROUTED, ROWS, TAKEN
from sluice.kernels.route_rows import Group


def _fake(ids: torch.Tensor, owners: torch.Tensor, counts: Group, place: int) -> None:
    return None


@operation(
    fake=_fake,
    mutates=("counts",),
    cpu="sluice.kernels.cpu.route_topk:count_selections",
)
def count_selections(ids: torch.Tensor, owners: torch.Tensor, counts: Group, place: int) -> None:
    """Count rows whose slots are all used.

    Args:
        ids: int32, (rows, slots).
        owners: int64, (rows,): token of the step, -1 for a row whose output is dropped. Or (0,)
            where nothing is counted by token.
        counts: `RouteCounts`, added to.
        place: row of the histogram.
    """
    kept = torch.ones_like(ids, dtype=torch.bool)
    taken = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    count_rows(ids, kept, taken, owners, counts, place)


def count_rows(
    ids: torch.Tensor,
    kept: torch.Tensor,
    taken: torch.Tensor,
    owners: torch.Tensor,
    counts: Group,
    place: int,
) -> None:
    """Add rows to the counts.

    Args:
        ids: (rows, slots).
        kept: bool, (rows, slots): which slots are used.
        taken: int64, (rows,): selections of the router's own that are not among them.
        owners: int64, (rows,) or (0,).
        counts: `RouteCounts`.
        place: row of the histogram.
    """
    histogram, ran = counts
    histogram[place].index_add_(0, ids.flatten().long(), kept.flatten().long())
    histogram[place, ROWS] += len(ids)
    histogram[place, MASKED] += taken.sum()
    if ran.numel():
        sums = torch.zeros((len(ids), 3), dtype=torch.int64, device=ids.device)
        sums[:, ACTIVE], sums[:, TAKEN], sums[:, ROUTED] = kept.sum(-1), taken, 1
        own = owners >= 0
        ran.index_add_(0, owners.clamp(min=0), sums * own.unsqueeze(-1))
