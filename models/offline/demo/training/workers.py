"""Data-parallel training in a few single-threaded processes of one machine.

On a small shared CPU this is much faster than one process with several threads: the processes meet
once in a step, threads meet in every operator.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes of one run, as one of them sees it; a team of one needs no communication."""

    rank: int = 0
    size: int = 1

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the team."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the team."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Value) -> list[Value]:
        """Collect one value of each member, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def run_team(size: int, work: Callable[[Team], Value]) -> Value:
    """Run ``work`` in this process and ``size - 1`` new ones; give back what it returns here.

    ``work`` must be picklable.
    """
    if size == 1:
        return work(Team())
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = Path(folder) / "rendezvous"
        context = mp.get_context("spawn")
        others = [
            context.Process(target=_join, args=(Team(rank, size), meeting_point, work), daemon=True)
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
        result = _join(Team(0, size), meeting_point, work)
        for process in others:
            process.join()
    return result


def _join(team: Team, meeting_point: Path, work: Callable[[Team], Value]) -> Value:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting_point.as_uri(), rank=team.rank, world_size=team.size
    )
    try:
        return work(team)
    finally:
        dist.destroy_process_group()
