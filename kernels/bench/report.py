"""Prints results and writes them as JSON and PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sluice.kernels.bench.clock import Sample
from sluice.kernels.bench.machine import Machine
from sluice.kernels.bench.measure import COPY, OURS, REFERENCE, Result

COLUMNS = ("operation", "rows", "us", "MB", "GB/s", "of copy", "copy us", "reference", "stock")
LEGEND = (
    "In brackets: the 10th and the 90th percentile. us: the median of what the device gets.",
    "MB, GB/s: each input read once and each output written once. of copy: share of the GB/s of a "
    "copy larger than the caches. copy us: a copy that moves as many bytes.",
    "reference, stock: how many times longer the plain PyTorch function takes, and what stock "
    "PyTorch and vLLM run at equal function; above 1 ours is faster.",
)


def report(results: Sequence[Result], machine: Machine, notes: Sequence[str], out: Path) -> None:
    """Print the table and write `kernels.json` and `kernels.png` to `out`.

    Args:
        results: at least one, in the order of the table.
        machine: what they were measured on.
        notes: what a reader must know beside them.
        out: folder; made if it is not there.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=machine.setting, caption="\n".join((*LEGEND, *notes)))
    table.caption_justify = "left"
    for name in COLUMNS:
        left = name in ("operation", "stock")
        table.add_column(name, justify="left" if left else "right")
    for result in results:
        table.add_row(*cells(result, machine.copy_bandwidth), style="red" if result.wrong else "")
    Console(width=160).print(table)
    out.mkdir(parents=True, exist_ok=True)
    measured = record(results, machine, notes)
    (out / "kernels.json").write_text(json.dumps(measured, indent=1) + "\n")
    _plot(results, machine, out / "kernels.png")


def cells(result: Result, copy_bandwidth: float) -> tuple[str, ...]:
    """One line of the table; what is wrong stands in its last column."""
    share = result.share(copy_bandwidth)
    beside = [f"{_spread(result.gain(name))} {name}" for name in result.counterparts]
    faults = [f"WRONG, {name}: {why}" for name, why in result.wrong.items()]
    same = OURS not in result.seconds and OURS not in result.wrong
    return (
        result.name,
        f"{result.rows}",
        _spread(result.ours, 1e6, 1),
        f"{result.moved / 1e6:.3f}",
        "" if result.bandwidth is None else f"{result.bandwidth / 1e9:.2f}",
        "" if share is None else f"{share:.1%}",
        f"{result.seconds[COPY].median * 1e6:.1f}",
        "is ours" if same else _spread(result.gain(REFERENCE)),
        "\n".join((*beside, *faults)),
    )


def record(results: Sequence[Result], machine: Machine, notes: Sequence[str]) -> dict[str, Any]:
    """All of it, as JSON has it; times in seconds."""
    return {
        "machine": machine.record(),
        "notes": list(notes),
        "rows": [
            {
                "name": result.name,
                "rows": result.rows,
                "implementation": result.implementation,
                "bytes": result.moved,
                "bytes_per_second": result.bandwidth,
                "share_of_copy": result.share(machine.copy_bandwidth),
                "timed": {name: _timed(result, name) for name in result.seconds},
                "wrong": result.wrong,
            }
            for result in results
        ],
    }


def _timed(result: Result, name: str) -> dict[str, Any]:
    sample, gain = result.seconds[name], result.gain(name)
    return {
        "median": sample.median,
        "spread": sample.spread,
        "over_ours": None if gain is None else gain.median,
        "over_ours_spread": None if gain is None else gain.spread,
        "seconds": sample.values,
    }


def _spread(sample: Sample | None, scale: float = 1.0, digits: int = 2) -> str:
    if sample is None:
        return ""
    low, high = (f"{scale * end:.{digits}f}" for end in sample.spread)
    return f"{scale * sample.median:.{digits}f} ({low}-{high})"


def _plot(results: Sequence[Result], machine: Machine, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result.name for result in results))
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    labels = dict.fromkeys(label for result in results for label in result.seconds)
    colours = {label: f"C{number}" for number, label in enumerate(sorted(labels))}
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        _draw(axes, [result for result in results if result.name == name], colours)
    figure.suptitle(f"{machine.setting}; median and 10th to 90th percentile")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw(axes: Any, results: Sequence[Result], colours: Mapping[str, str]) -> None:
    """One operation: microseconds by rows."""
    for label in dict.fromkeys(name for result in results for name in result.seconds):
        drawn = [result for result in results if label in result.seconds]
        rows = [result.rows for result in drawn]
        samples = [result.seconds[label] for result in drawn]
        medians = [1e6 * sample.median for sample in samples]
        low, high = zip(*(sample.spread for sample in samples), strict=True)
        style, colour = ":" if label == COPY else "-", colours[label]
        axes.plot(rows, medians, style, marker="o", markersize=3, color=colour, label=label)
        ends = ([1e6 * end for end in each] for each in (low, high))
        axes.fill_between(rows, *ends, color=colour, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(results[0].name, fontsize="medium")
    axes.set_xlabel("rows")
    axes.set_ylabel("us")
    axes.legend(fontsize="x-small")
