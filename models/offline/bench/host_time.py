"""`python -m sluice.models.offline.bench.host_time`: a routed decode step, beside the model itself.

One engine on the dense model, in this process. Of each step the time from the beginning of its plan
to the end of its last layer counts, less that in the model's own parts: plans, masks, gathering of
rows, attention metadata. `loop` gathers the rows of each layer. `launches` keeps them all on static
buffers, as on CUDA: here each launch is a plain call, and what starting a graph takes is not in it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sluice.models.offline.bench.model import LAYERS, BenchModel, make_bench_model
from sluice.models.offline.bench.rows import Row, alternating, always_after, half_of_the_blocks
from sluice.models.policy.policy import RoutingPolicy

BATCHES = (1, 8, 32)
_EXITS = RoutingPolicy(exit=always_after(LAYERS // 2 - 1))


@dataclass(frozen=True, slots=True)
class HostTime:
    """Of one policy, batch and way.

    Attributes:
        policy: what the requests ask.
        batch: requests.
        way: `loop` or `launches`.
        milliseconds: a step, beside the model; median of the repeats.
        launches: a step; None for the loop.
    """

    policy: str
    batch: int
    way: str
    milliseconds: float
    launches: float | None


class _Clock:
    """Time of decode steps, and in the model's parts."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, rows: int) -> None:
        """Count decode steps with so many rows from now on."""
        self.rows, self.steps, self.launches = rows, 0, 0
        self._host, self._model = 0.0, 0.0

    def model(self, part: Callable[..., Any], *, launch: bool = False) -> Callable[..., Any]:
        """A part of the model, timed."""

        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = part(*args, **named)
            self._model += time.perf_counter() - began
            self.launches += launch
            return result

        return timed

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `LaunchRecorder.record`."""
        return self.model(run, launch=True)

    @contextmanager
    def step(self, planning: float) -> Iterator[None]:
        """Time the run of a step that took so long to plan."""
        before, began = self._model, time.perf_counter()
        yield
        self._host += planning + time.perf_counter() - began - (self._model - before)
        self.steps += 1

    @property
    def milliseconds(self) -> float:
        """A step, beside the model."""
        return 1e3 * self._host / self.steps


class _Timed:
    """An engine whose routed decode steps are timed, by either way."""

    def __init__(self, runner: Any, clock: _Clock) -> None:
        from sluice.models.engine.captured.decode import CapturedDecode, DecodeBuffers
        from sluice.models.engine.captured.recorders import Limits
        from sluice.models.engine.loop import LayerLoop
        from sluice.models.engine.sublayers.static import StaticLayer
        from sluice.models.engine.sublayers.sublayers import SubLayers, plain_sublayers

        self._core, self._clock = runner.core, clock
        self.launches = False
        routed, config = runner.core.routed, runner.vllm_config.model_config
        stack = replace(
            routed.stack,
            embed=clock.model(routed.stack.embed),
            final_norm=clock.model(routed.stack.final_norm),
            compute_logits=clock.model(routed.stack.compute_logits),
        )
        parts = plain_sublayers(stack)
        sublayers = SubLayers(
            **{
                name: [clock.model(part) for part in getattr(parts, name)]
                for name in ("attend", "run_mlp", "block", "fill")
            },
            final_norm=stack.final_norm,
        )
        layers = [StaticLayer(layer) for layer in stack.layers]
        buffers = DecodeBuffers.allocate(
            len(layers), max(BATCHES), config.get_hidden_size(), config.dtype, runner.device
        )
        captured = CapturedDecode(layers, buffers, clock, Limits(math.inf, 1))
        for rows in BATCHES:
            captured.capture(rows)
        loop = LayerLoop(stack, sublayers, routed.batch.plan_layers, None, captured)
        self._core.routed = replace(routed, loop=loop)
        self._plan, self._run = self._core.plan, self._core.run
        self._core.plan, self._core.run = self._timed_plan, self._timed_run
        self._planning = 0.0

    def _timed_plan(self, requests: Any) -> Any:
        began = time.perf_counter()
        step = self._plan(requests)
        self._planning = time.perf_counter() - began
        return step

    def _timed_run(self, step: Any, positions: Any, input_ids: Any, *others: Any) -> Any:
        rows = len(step.requests.ids)
        decodes = step.plan.shape.one_row_each and rows == self._clock.rows
        if not decodes:
            return self._run(step, positions, input_ids, *others)
        with self._clock.step(self._planning):
            if self.launches:
                return self._core.run_captured(step, positions, input_ids, rows)
            return self._run(step, positions, input_ids, *others)


def measured(repeats: int) -> list[HostTime]:
    """Run everything; a repeat runs all policies and both ways once, in turn."""
    from sluice.models.engine.workers import CPU_WORKER
    from sluice.models.offline.bench.engines import bench_engine

    half = half_of_the_blocks()
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        make_bench_model(BenchModel.DENSE, Path(folder))
        start = (BenchModel.DENSE, Path(folder), CPU_WORKER)
        with bench_engine(*start, eager=True, in_process=True) as bench:
            clock = _Clock()
            timed = _Timed(bench.engine.model_runner, clock)
            cases = [
                (Row(name, policies), way)
                for batch in BATCHES
                for name, policies in _policies(half, batch).items()
                for way in ("loop", "launches")
            ]
            for repeat in range(-1, repeats):  # The one before the first is a warm-up.
                for row, way in cases:
                    batch = len(row.policies)
                    timed.launches = way == "launches"
                    clock.start(batch)
                    bench.seconds(row, repeat, routed=True)
                    if repeat >= 0:
                        each = (clock.milliseconds, clock.launches / clock.steps)
                        found.setdefault((row.name, batch, way), []).append(each)
    return [_row(*key, values) for key, values in found.items()]


def _policies(half: RoutingPolicy, batch: int) -> dict[str, tuple[RoutingPolicy | None, ...]]:
    rows = {
        "all skip half of the blocks": (half,) * batch,
        "all leave halfway": (_EXITS,) * batch,
    }
    return rows | (
        {"half of them skip half": alternating(half, batch // 2, batch)} if batch > 1 else {}
    )


def _row(policy: str, batch: int, way: str, values: Sequence[tuple[float, float]]) -> HostTime:
    milliseconds, launches = (statistics.median(part) for part in zip(*values, strict=True))
    return HostTime(policy, batch, way, milliseconds, launches if way == "launches" else None)


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench.host_time", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    for row in measured(args.repeats):
        launches = "" if row.launches is None else f", {row.launches:.1f} launches"
        print(
            f"batch {row.batch}, {row.policy}, {row.way}: {row.milliseconds:.2f} ms{launches}",
            flush=True,
        )


if __name__ == "__main__":
    main()
