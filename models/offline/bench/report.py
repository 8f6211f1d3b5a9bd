"""Prints results and writes them as JSON and PNG."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path

from sluice.models.offline.bench.measure import Result
from sluice.models.offline.bench.model import BenchModel


def report(
    results: list[Result], parameters: Mapping[BenchModel, int], out: Path, *, eager: bool
) -> None:
    """Print the table and write `bench.json` and `bench.png` to `out`."""
    from rich.console import Console
    from rich.table import Table

    mode = "eager" if eager else "compiled"
    sizes = ", ".join(f"{count / 1e6:.0f} M {kind}" for kind, count in parameters.items())
    setting = f"{sizes}, fp32, {mode}, {os.cpu_count()} cores"
    table = Table(title=f"Ratio to stock vLLM ({setting}); above 1 is faster")
    for name in ("row", "ratio", "spread", "ideal", "bar", "stock s", "ours s", "experts"):
        table.add_column(name, justify="left" if name == "row" else "right")
    for result in results:
        style = {None: "", True: "green", False: "red"}[result.met]
        table.add_row(
            result.row.name,
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
            "" if result.ideal is None else f"{result.ideal:.2f}",
            "" if result.row.bar is None else f">= {result.row.bar}",
            f"{statistics.median(result.stock_seconds):.3f}",
            f"{statistics.median(result.our_seconds):.3f}",
            "" if result.loaded is None else f"{result.loaded[0]:.1f} to {result.loaded[1]:.1f}",
            style=style,
        )
    Console(width=132).print(table)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "setting": setting,
        "parameters": {kind.value: count for kind, count in parameters.items()},
        "machine": platform.processor() or platform.machine(),
        "rows": [
            {
                "name": result.row.name,
                "ratio": result.ratio,
                "bar": result.row.bar,
                "met": result.met,
                "ideal": result.ideal,
                "experts_loaded": result.loaded,
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
        [result.ideal or math.nan for result in results],
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
