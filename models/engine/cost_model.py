"""Whether compacting the rows of a layer is cheaper than masking them, by measurement.

A row that does not need a sub-layer can be taken out of it, or stay in and have its output
dropped. Taking out saves compute and costs copies, attention metadata, and, for rows that fill K/V
while others attend, a second read of the projection's weights. Which is cheaper depends on model
and machine, so both are timed once at start-up on one of the model's own layers.

A row that neither attends nor fills is kept in an attention only where its request has no other row
in the step. What it reads there nobody wrote, and an attention works through the rows of a request
together; its slot is -1, so that it writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import nn

from sluice.kernels.ops.row_compact import row_compact, row_scatter
from sluice.models.engine.plan import LayerNeeds, LayerPlan, Rows, StepShape, Work
from sluice.models.engine.sublayers.sublayers import SubLayers
from sluice.models.policy.axes import FloatArray
from sluice.models.vllm_adapter.decoder import DecoderLayer, DecoderStack, input_width

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds by number of rows, float64, (sizes,), on the grid of sizes.

    Attributes:
        attention: projections of an attention.
        fill: projection of an attention that only writes K/V.
        mlp: an MLP or mixture of experts.
        move: gathering rows and scattering them back.
    """

    attention: FloatArray
    fill: FloatArray
    mlp: FloatArray
    move: FloatArray

    @classmethod
    def measure(
        cls, stack: DecoderStack, sublayers: SubLayers, hidden_size: int, dtype: torch.dtype
    ) -> CostModel:
        """Time one layer in the middle of the model; vLLM's forward context must be set."""
        index = len(stack.layers) // 2
        layer = stack.layers[index]

        def mlp(rows: torch.Tensor) -> object:
            return sublayers.run_mlp[index](rows, torch.zeros_like(rows), None)

        device = next(iter(layer.mlp.parameters())).device
        columns = []
        for size in _SIZES:
            rows = torch.randn(size, hidden_size, dtype=dtype, device=device)
            columns.append([_seconds(run, rows) for run in (*_parts(layer, rows), mlp)])
        attention, fill, move, mlp_seconds = np.maximum.accumulate(np.array(columns), axis=0).T
        return cls(attention=attention, fill=fill, mlp=mlp_seconds, move=move)

    @classmethod
    def from_array(cls, table: FloatArray) -> CostModel:
        """Inverse of `to_array`."""
        return cls(*table)

    def to_array(self) -> FloatArray:
        """(4, sizes)."""
        return np.stack([self.attention, self.fill, self.mlp, self.move])

    def plan_layers(self, shape: StepShape, needs: Sequence[LayerNeeds]) -> list[LayerPlan]:
        """Choose which rows each layer runs, for the rows that need to.

        Layers that need the same rows one after the other are run alike. Of the ways through all of
        them the cheapest is taken: between two layers that run the same rows nothing is copied.
        """
        ways = {each: self._ways(shape, each) for each in set(needs)}
        # By the rows that are gathered last: the cheapest way there, and its choices.
        best: dict[int, tuple[float, tuple[_Way, ...]]] = {id(shape.everything): (0.0, ())}
        counts = []
        for each, group in groupby(needs):
            counts.append(sum(1 for _ in group))
            reached: dict[int, tuple[float, tuple[_Way, ...]]] = {}
            for way in ways[each]:
                alike = counts[-1] * way.seconds + (counts[-1] - 1) * self._entry(way, way.last)
                for gathered, (seconds, chosen) in best.items():
                    total = seconds + self._entry(way, gathered) + alike
                    last = gathered if way.last is None else way.last
                    if last not in reached or total < reached[last][0]:
                        reached[last] = (total, (*chosen, way))
            best = reached
        _, chosen = min(best.values(), key=lambda found: found[0])
        return [way.plan for way, n in zip(chosen, counts, strict=True) for _ in range(n)]

    def _ways(self, shape: StepShape, needs: LayerNeeds) -> list[_Way]:
        """All ways to run one layer."""
        attention, fill, mlp = needs
        everything, ways = shape.everything, []
        merged = shape.union(attention, fill)
        attends: list[tuple[Rows, Rows]] = [(attention, fill)]
        if len(attention):
            wider = [merged, everything] if shape.one_row_each else [merged]
            attends += [(rows, shape.nothing) for rows in wider if rows is not attention]
        for attend, separate in dict.fromkeys(attends):
            # Rows that must run the MLP, or more that are gathered already.
            more = (run for run in (attend, everything) if shape.contains(run, mlp))
            for run in dict.fromkeys((mlp, *more) if len(mlp) else (mlp,)):
                plan = LayerPlan(
                    *needs,
                    attend=Work.keeping(attend, attention),
                    writes=attention if len(separate) else merged,
                    separate_fill=separate,
                    run_mlp=Work.keeping(run, mlp),
                )
                ways.append(self._way(plan))
        return ways

    def _way(self, plan: LayerPlan) -> _Way:
        parts = (
            (plan.separate_fill, self.fill),
            (plan.attend.rows, self.attention),
            (plan.run_mlp.rows, self.mlp),
        )
        ran = [(rows, costs) for rows, costs in parts if len(rows)]
        seconds = sum(_at(costs, len(rows)) for rows, costs in ran)
        for (before, _), (rows, _) in pairwise(ran):
            if rows is not before:
                seconds += self._move(rows)
        if not ran:
            return _Way(plan, 0.0, None, 0.0, None)
        first, last = ran[0][0], ran[-1][0]
        return _Way(plan, seconds, id(first), self._move(first), id(last))

    def _move(self, rows: Rows) -> float:
        """Gathering rows, and scattering them later."""
        return 0.0 if rows.everything else _at(self.move, len(rows))

    def _entry(self, way: _Way, gathered: int | None) -> float:
        """What a layer costs on top if these rows were gathered before it."""
        return 0.0 if way.first in (None, gathered) else way.move


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to run a layer.

    Attributes:
        plan: says it.
        seconds: that it takes, without the copies before its first rows.
        first: identity of the rows that run first, or None if none do.
        move: what gathering these costs.
        last: identity of the rows that run last.
    """

    plan: LayerPlan
    seconds: float
    first: int | None
    move: float
    last: int | None


def _at(costs: FloatArray, rows: int) -> float:
    """Interpolated, and in proportion beyond the grid."""
    if rows > _SIZES[-1]:
        return float(costs[-1]) * rows / _SIZES[-1]
    return float(np.interp(rows, _SIZES, costs))


def _parts(layer: DecoderLayer, rows: torch.Tensor) -> list[Callable[[torch.Tensor], object]]:
    """What is timed of a layer on so many rows: attention, fill, move."""

    def project(parts: tuple[nn.Module, ...]) -> Callable[[torch.Tensor], object]:
        inputs = [(part, rows.new_ones(len(rows), input_width(part))) for part in parts]

        def run(_rows: torch.Tensor) -> None:
            for part, part_input in inputs:
                part(part_input)

        return run

    residual = torch.zeros_like(rows)

    def move(delta: torch.Tensor) -> None:
        index = torch.arange(len(delta), device=delta.device)
        row_scatter(delta, residual, index, *row_compact(delta, residual, index))

    return [project(layer.projections), project(layer.fill_projections), move]


def _seconds(run: Callable[[torch.Tensor], object], rows: torch.Tensor) -> float:
    """Least of a few runs."""
    run(rows.clone())
    times = []
    for _ in range(_REPEATS):
        copy = rows.clone()
        if rows.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(copy)
        if rows.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
