"""`python -m sluice.models.bench`: prints the table and writes JSON and PNG."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sluice.models.bench.engines import BenchEngine
from sluice.models.bench.exits import RecordedExits
from sluice.models.bench.rows import Row, rows
from sluice.models.seams import CPU_WORKER

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"


@dataclass(frozen=True, slots=True)
class Result:
    """One measured row.

    Attributes:
        row: what was measured.
        ratios: stock time over ours, one per repeat.
        stock_seconds: stock vLLM's times.
        our_seconds: our times.
    """

    row: Row
    ratios: list[float]
    stock_seconds: list[float]
    our_seconds: list[float]

    @property
    def ratio(self) -> float:
        """Median ratio; above 1 is faster than stock vLLM."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the promised ratio was reached; None if none was promised."""
        return None if self.row.bar is None else self.ratio >= self.row.bar


def main() -> None:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(prog="python -m sluice.models.bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.json and .png")
    parser.add_argument("--repeats", type=int, default=6, help="pairs per row, at least 5")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="both engines with torch.compile")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error("--repeats must be at least 5")
    chosen = [row for row in rows(RecordedExits.load()) if args.rows in row.name]
    if not chosen:
        parser.error(f"no row's name contains {args.rows!r}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    results, parameters = run(chosen, args.repeats, eager=not args.compiled)
    report(results, parameters, args.out, eager=not args.compiled)


def run(chosen: list[Row], repeats: int, *, eager: bool) -> tuple[list[Result], int]:
    """Measure rows; each repeat runs both engines, in alternating order, on equal prompts.

    Returns:
        The results and the model's number of parameters.
    """
    from rich.progress import track

    from sluice.models.bench.model import make_bench_model

    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        parameters = make_bench_model(Path(folder))
        with (
            closing(BenchEngine(Path(folder), STOCK_WORKER, eager)) as stock,
            closing(BenchEngine(Path(folder), CPU_WORKER, eager)) as ours,
        ):
            results = [_measure(row, repeats, stock, ours) for row in track(chosen, "measuring")]
    return results, parameters


def _measure(row: Row, repeats: int, stock: BenchEngine, ours: BenchEngine) -> Result:
    result = Result(row, [], [], [])
    sides = [(stock, False, result.stock_seconds), (ours, True, result.our_seconds)]
    for engine, routed, _ in sides:
        engine.seconds(row, seed=0, routed=routed)  # Warm-up.
    for repeat in range(repeats):
        for engine, routed, times in sides[:: 1 if repeat % 2 else -1]:
            times.append(engine.seconds(row, seed=repeat, routed=routed))
        result.ratios.append(result.stock_seconds[-1] / result.our_seconds[-1])
    return result


def report(results: list[Result], parameters: int, out: Path, *, eager: bool) -> None:
    """Print the table and write `bench.json` and `bench.png` to `out`."""
    from rich.console import Console
    from rich.table import Table

    mode = "eager" if eager else "compiled"
    setting = f"{parameters / 1e6:.0f} M dense, fp32, {mode}, {os.cpu_count()} cores"
    table = Table(title=f"Ratio to stock vLLM ({setting}); above 1 is faster")
    for name in ("row", "ratio", "spread", "ideal", "bar", "stock s", "ours s"):
        table.add_column(name, justify="left" if name == "row" else "right")
    for result in results:
        style = {None: "", True: "green", False: "red"}[result.met]
        table.add_row(
            result.row.name,
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
            "" if result.row.ideal is None else f"{result.row.ideal:.2f}",
            "" if result.row.bar is None else f">= {result.row.bar}",
            f"{statistics.median(result.stock_seconds):.3f}",
            f"{statistics.median(result.our_seconds):.3f}",
            style=style,
        )
    Console(width=120).print(table)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "setting": setting,
        "parameters": parameters,
        "machine": platform.processor() or platform.machine(),
        "rows": [
            {
                "name": result.row.name,
                "ratio": result.ratio,
                "bar": result.row.bar,
                "met": result.met,
                "ideal": result.row.ideal,
                "ratios": result.ratios,
                "stock_seconds": result.stock_seconds,
                "our_seconds": result.our_seconds,
            }
            for result in results
        ],
    }
    (out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(results, setting, out / "bench.png")


def _plot(results: list[Result], setting: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(results) + 1.5), layout="constrained")
    positions = range(len(results))[::-1]
    medians = [result.ratio for result in results]
    spread = [
        [result.ratio - min(result.ratios) for result in results],
        [max(result.ratios) - result.ratio for result in results],
    ]
    axes.barh(positions, medians, xerr=spread, color="#4878a8", ecolor="#333333", capsize=3)
    axes.plot(
        [result.row.ideal or math.nan for result in results],
        positions,
        "k|",
        markersize=14,
        label="ideal",
    )
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.set_yticks(positions, [result.row.name for result in results])
    axes.set_xlabel("speed relative to stock vLLM (median and range)")
    axes.set_title(setting)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
