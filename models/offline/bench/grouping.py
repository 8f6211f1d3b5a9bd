"""`python -m sluice.models.offline.bench.grouping`: what `--group-by-depth` saves.

Two engines on the dense model with room for 8 requests get 32 at once, of which every other one
leaves out half of the blocks. One takes them in turn, the other by depth.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from sluice.models.engine.workers import CPU_WORKER, GROUP_BY_DEPTH_ENV, GROUPING_SCHEDULER
from sluice.models.offline.bench.engines import bench_engine
from sluice.models.offline.bench.model import BenchModel, make_bench_model
from sluice.models.offline.bench.rows import Row, half_of_the_blocks
from sluice.models.offline.intervals import LEAST_REPEATS, median_interval

REQUESTS = 32
SLOTS = 8
IDEAL = 4 / 3
"""Of four batches two run half of the layers. In turn, every batch has a request that needs all."""
_PATIENCE_SECONDS = 600.0


def measured(repeats: int, *, eager: bool) -> list[float]:
    """Time in turn over time by depth, one per repeat."""
    row = Row("by depth", (None, half_of_the_blocks()) * (REQUESTS // 2), measure="batch")
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        make_bench_model(BenchModel.DENSE, Path(folder))
        os.environ[GROUP_BY_DEPTH_ENV] = str(_PATIENCE_SECONDS)
        start = (BenchModel.DENSE, Path(folder), CPU_WORKER, eager)
        with (
            bench_engine(*start, max_num_seqs=SLOTS) as in_turn,
            bench_engine(*start, max_num_seqs=SLOTS, scheduler_cls=GROUPING_SCHEDULER) as by_depth,
        ):
            ratios = []
            for repeat in range(-1, repeats):  # The one before the first is a warm-up.
                engines = [in_turn, by_depth][:: 1 if repeat % 2 else -1]
                took = {engine: engine.seconds(row, repeat, routed=True) for engine in engines}
                ratios.append(took[in_turn] / took[by_depth])
            return ratios[1:]


def main() -> None:
    """Print the median and its interval."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench.grouping", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="pairs")
    parser.add_argument("--compiled", action="store_true", help="both engines with torch.compile")
    args = parser.parse_args()
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}")
    ratio = median_interval(measured(args.repeats, eager=not args.compiled))
    mode = "compiled" if args.compiled else "eager"
    print(
        f"{REQUESTS} requests, {SLOTS} at a time, half of them with half of the blocks, {mode}: "
        f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) times as fast by depth as in turn, "
        f"ideal {IDEAL:.2f}"
    )


if __name__ == "__main__":
    main()
