"""Measures rows: stock vLLM and ours, interleaved, on equal prompts."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from sluice.models.engine.workers import CPU_WORKER
from sluice.models.offline.bench.engines import BenchEngine, bench_engine
from sluice.models.offline.bench.expert_rows import NEUTRAL
from sluice.models.offline.bench.model import BenchModel, make_bench_model, step_weights
from sluice.models.offline.bench.rows import Row

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


@dataclass(slots=True)
class Result:
    """One measured row.

    Attributes:
        row: what was measured.
        ratios: stock time over ours, one per repeat.
        stock_seconds: stock vLLM's times.
        our_seconds: our times.
        loaded: distinct experts per layer and step, of stock vLLM and ours; None without experts.
    """

    row: Row
    ratios: list[float] = field(default_factory=list)
    stock_seconds: list[float] = field(default_factory=list)
    our_seconds: list[float] = field(default_factory=list)
    loaded: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """Median ratio; above 1 is faster than stock vLLM."""
        return statistics.median(self.ratios)

    @property
    def ideal(self) -> float | None:
        """Ratio if a step were its rows' layers and nothing else, or None if not known.

        With fewer experts loaded it is the ratio of the weights that a step reads: at the batch
        sizes measured here reading them is what a step's time goes into.
        """
        if self.row.ideal is None and self.loaded is not None:
            return step_weights(self.loaded[0]) / step_weights(self.loaded[1])
        return self.row.ideal

    @property
    def met(self) -> bool | None:
        """Whether the promised ratio was reached; None if none was promised."""
        return None if self.row.bar is None else self.ratio >= self.row.bar


def measure(
    chosen: Sequence[Row], repeats: int, *, eager: bool
) -> tuple[list[Result], dict[BenchModel, int]]:
    """Measure rows.

    Each repeat runs both engines, in alternating order. Of two engines on one machine the one
    that was started second may be slower by a few per cent, so half of the repeats are measured
    after starting them the other way round.

    Returns:
        The results, and the parameters of the models in them.
    """
    results = [Result(row) for row in chosen]
    parameters: dict[BenchModel, int] = {}
    for kind in BenchModel:
        of_kind = [result for result in results if result.row.model is kind]
        if not of_kind:
            continue
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
            parameters[kind] = make_bench_model(kind, Path(folder))
            half = repeats // 2
            for numbers, ours_first in ((range(half), False), (range(half, repeats), True)):
                _measure_round(of_kind, kind, Path(folder), numbers, ours_first, eager)
    return results, parameters


def _measure_round(
    results: list[Result],
    kind: BenchModel,
    folder: Path,
    numbers: range,
    ours_first: bool,
    eager: bool,
) -> None:
    workers = [STOCK_WORKER, CPU_WORKER][:: -1 if ours_first else 1]
    with ExitStack() as stack:
        engines = {
            worker: stack.enter_context(bench_engine(kind, folder, worker, eager))
            for worker in workers
        }
        stock, ours = engines[STOCK_WORKER], engines[CPU_WORKER]
        first = "ours" if ours_first else "stock"
        for place, result in enumerate(results, start=1):
            _measure(result, numbers, stock, ours)
            # Lines, not a bar: it takes an hour, and its output mostly goes to a file.
            found = ", ".join(f"{ratio:.2f}" for ratio in result.ratios[-len(numbers) :])
            print(
                f"{kind}, {first} started first, {place} of {len(results)}: "
                f"{result.row.name}: {found}",
                file=sys.stderr,
                flush=True,
            )
            if kind is BenchModel.MOE and result.loaded is None:
                result.loaded = _loaded(result.row, ours)


def _measure(result: Result, numbers: range, stock: BenchEngine, ours: BenchEngine) -> None:
    sides = [(stock, False, result.stock_seconds), (ours, True, result.our_seconds)]
    for engine, routed, _ in sides:
        engine.seconds(result.row, seed=0, routed=routed)  # Warm-up.
    for repeat in numbers:
        for engine, routed, times in sides[:: 1 if repeat % 2 else -1]:
            times.append(engine.seconds(result.row, seed=repeat, routed=routed))
        result.ratios.append(result.stock_seconds[-1] / result.our_seconds[-1])


def _loaded(row: Row, ours: BenchEngine) -> tuple[float, float]:
    neutral = replace(row, policies=(NEUTRAL,) * len(row.policies))
    stock = ours.experts_loaded(neutral, seed=0)
    asks = all(policy is not None for policy in row.policies)
    return stock, ours.experts_loaded(row, seed=0) if asks else stock
