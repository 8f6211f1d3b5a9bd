"""Whether compacting the rows of a layer is cheaper than masking them, by measurement.

A row that does not need a sub-layer can be taken out of it, or stay in and have its output
dropped. Taking out saves compute and costs copies, attention metadata, and, for rows that fill K/V
while others attend, a second read of the projection's weights. Which is cheaper depends on model
and machine, so both are timed once at start-up on one of the model's own layers.

Rows that neither attend nor fill are never kept in an attention: they have no K/V there to read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sluice.kernels.ops.row_compact import row_compact, row_scatter
from sluice.models.engine.plan import LayerPlan, Rows, StepShape, Work
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
    def measure(cls, stack: DecoderStack, hidden_size: int, dtype: torch.dtype) -> CostModel:
        """Time one layer in the middle of the model; vLLM's forward context must be set."""
        layer = stack.layers[len(stack.layers) // 2]
        device = next(iter(layer.mlp.parameters())).device
        columns = []
        for size in _SIZES:
            rows = torch.randn(size, hidden_size, dtype=dtype, device=device)
            columns.append([_seconds(run, rows) for run in _parts(layer, rows)])
        table = np.maximum.accumulate(np.array(columns), axis=0)
        return cls(*table.T)

    @classmethod
    def from_array(cls, table: FloatArray) -> CostModel:
        """Inverse of `to_array`."""
        return cls(*table)

    def to_array(self) -> FloatArray:
        """(4, sizes)."""
        return np.stack([self.attention, self.fill, self.mlp, self.move])

    def plan_layer(self, shape: StepShape, attention: Rows, fill: Rows, mlp: Rows) -> LayerPlan:
        """Choose which rows to run for the rows that need to."""
        everything = shape.everything
        merged = shape.union(attention, fill) if len(fill) and len(attention) else None
        attends = [(attention, fill)] if merged is None else [(attention, fill), (merged, None)]
        best: tuple[float, Rows, Rows | None, Rows] | None = None
        for attend, separate in attends:
            # Rows that must run the MLP, or more that are gathered already.
            wider = (run for run in (attend, everything) if shape.contains(run, mlp))
            for run in (mlp, *wider) if len(mlp) else (mlp,):
                seconds = self._seconds(attend, separate, run)
                if best is None or seconds < best[0]:
                    best = (seconds, attend, separate, run)
        assert best is not None
        _, attend, separate, run = best
        return LayerPlan(
            attention=attention,
            fill=fill,
            mlp=mlp,
            attend=Work.keeping(attend, attention),
            separate_fill=shape.nothing if separate is None else separate,
            run_mlp=Work.keeping(run, mlp),
        )

    def _seconds(self, attend: Rows, separate: Rows | None, mlp: Rows) -> float:
        """Cost of one layer if the layers around it are planned alike."""
        steps = [
            (rows, costs)
            for rows, costs in (
                (separate, self.fill),
                (attend, self.attention),
                (mlp, self.mlp),
            )
            if rows is not None and len(rows)
        ]
        seconds = sum(_at(costs, len(rows)) for rows, costs in steps)
        for (rows, _), (before, _) in zip(steps, [*steps[-1:], *steps[:-1]], strict=True):
            if rows is not before and not rows.everything:
                seconds += _at(self.move, len(rows))
        return seconds


def _at(costs: FloatArray, rows: int) -> float:
    """Interpolated, and in proportion beyond the grid."""
    if rows > _SIZES[-1]:
        return float(costs[-1]) * rows / _SIZES[-1]
    return float(np.interp(rows, _SIZES, costs))


def _parts(layer: DecoderLayer, rows: torch.Tensor) -> list[Callable[[torch.Tensor], object]]:
    """The timed operations on so many rows, in the order of the columns."""

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

    return [project(layer.projections), project(layer.fill_projections), layer.mlp, move]


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
