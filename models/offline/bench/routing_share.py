"""`python -m sluice.models.offline.bench.routing_share`: what routing costs of a decode step.

One engine on the mixture of experts, in this process, so that both implementations of the routing
operations meet the same machine in the same minute: vLLM's own routine, then the same step with
controls under the plain PyTorch operations and under those that the device gets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sluice.models.offline.bench.engines import bench_engine
from sluice.models.offline.bench.expert_rows import (
    BATCHES,
    HALF,
    HALF_NAME,
    NEUTRAL,
    NEUTRAL_NAME,
    OEA,
    OEA_NAME,
)
from sluice.models.offline.bench.model import EXPERT_LAYERS, BenchModel, make_bench_model
from sluice.models.offline.bench.rows import Row
from sluice.models.policy.policy import RoutingPolicy

_STOCK = "vLLM's own"
POLICIES: dict[str, RoutingPolicy | None] = {
    _STOCK: None,
    NEUTRAL_NAME: NEUTRAL,
    HALF_NAME: HALF,
    OEA_NAME: OEA,
}


@dataclass(frozen=True, slots=True)
class Share:
    """Routing in the decode steps of one batch.

    Attributes:
        policy: what all requests ask.
        choice: implementation of the operations.
        batch: requests.
        routing: milliseconds in routers a step, medians of the repeats.
        step: milliseconds a step.
        added: routing beyond that of vLLM's own steps, share of those steps.
        spread: smallest and largest `added` of the repeats.
    """

    policy: str
    choice: str
    batch: int
    routing: float
    step: float
    added: float
    spread: tuple[float, float]


class _Clock:
    """Time that an engine's routers take in steps of one size."""

    def __init__(self, router: Any) -> None:
        self._seconds, self._calls, self._rows = 0.0, 0, 0
        route = router.route

        def timed(layer: int, logits: Any, *args: Any) -> Any:
            began = time.perf_counter()
            result = route(layer, logits, *args)
            if len(logits) == self._rows:
                self._seconds += time.perf_counter() - began
                self._calls += 1
            return result

        router.route = timed

    def start(self, rows: int) -> None:
        """Count calls with this many rows from now on."""
        self._seconds, self._calls, self._rows = 0.0, 0, rows

    @property
    def per_step(self) -> float:
        """Seconds in all layers of a step."""
        return self._seconds / self._calls * EXPERT_LAYERS


def measured(batches: Sequence[int], repeats: int) -> list[Share]:
    """Run everything; a repeat runs all policies and implementations once, in turn."""
    from sluice.kernels import dispatch
    from sluice.models.engine.workers import CPU_WORKER

    shares: list[Share] = []
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        make_bench_model(BenchModel.MOE, Path(folder))
        with bench_engine(
            BenchModel.MOE, Path(folder), CPU_WORKER, eager=True, in_process=True
        ) as bench:
            clock = _Clock(bench.engine.model_runner.routed.router)
            for batch in batches:
                times: dict[tuple[str, str], list[tuple[float, float]]] = {}
                for repeat in range(-1, repeats):
                    for choice in (dispatch.REFERENCE, dispatch.AUTO):
                        os.environ[dispatch.VARIABLE] = choice
                        dispatch.chosen.cache_clear()
                        for name, policy in POLICIES.items():
                            row = Row(name, (policy,) * batch, model=BenchModel.MOE)
                            clock.start(batch)
                            seconds = bench.seconds(row, repeat, routed=policy is not None)
                            if repeat >= 0:  # The first is a warm-up.
                                per_step = (clock.per_step, seconds / (row.new_tokens - 1))
                                times.setdefault((name, choice), []).append(per_step)
                shares += _shares(batch, times)
    return shares


def _shares(batch: int, times: dict[tuple[str, str], list[tuple[float, float]]]) -> list[Share]:
    shares = []
    for (name, choice), repeats in times.items():
        added = [
            (routing - stock_routing) / stock_step
            for (routing, _), (stock_routing, stock_step) in zip(
                repeats, times[_STOCK, choice], strict=True
            )
        ]
        routing, step = (1e3 * statistics.median(part) for part in zip(*repeats, strict=True))
        median = statistics.median(added)
        shares.append(Share(name, choice, batch, routing, step, median, (min(added), max(added))))
    return shares


def main() -> None:
    """Print the table and write `routing_share.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench.routing_share", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for routing_share.json")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("--repeats must be at least 5")
    shares = measured(args.batches, args.repeats)

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Routing in a decode step (205 M, fp32, eager, {os.cpu_count()} cores)")
    for name in ("policy", "operations", "batch", "routing ms", "step ms", "added", "spread"):
        table.add_column(name, justify="left" if name in ("policy", "operations") else "right")
    for share in shares:
        low, high = share.spread
        table.add_row(
            share.policy,
            share.choice,
            str(share.batch),
            f"{share.routing:.2f}",
            f"{share.step:.2f}",
            f"{share.added:.1%}",
            f"{low:.1%} to {high:.1%}",
        )
    Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "routing_share.json"
    path.write_text(json.dumps([asdict(share) for share in shares], indent=1) + "\n")


if __name__ == "__main__":
    main()
