"""`python -m sluice.kernels.bench`: checks every operation at every size, then times it.

Prints the table and writes `kernels.json` and `kernels.png`. On a machine with a GPU it measures
there, all of it in one go. What gives a wrong result is not timed, and the status is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sluice.kernels.bench.cases.catalogue import OPERATIONS, Entry
from sluice.kernels.bench.cases.counterparts import missing
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.bench.clock import clock_for
from sluice.kernels.bench.machine import Machine
from sluice.kernels.bench.measure import Result, measure, served
from sluice.kernels.bench.report import report

LEAST_REPEATS = 5
_ON_A_CPU = (
    "Triton is not timed on a CPU, where only its interpreter runs: the device gets the CPU's own "
    "implementation, or PyTorch's operators where these are best."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; the exit status."""
    from rich.progress import track

    args = _parsed(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    chosen = [entry for entry in OPERATIONS if entry.name in args.ops]
    shapes = Shapes.for_device(args.device)
    clock = clock_for(shapes.device)
    machine = Machine.measured(shapes.device, clock, args.repeats)
    results: list[Result] = []
    try:
        for entry, rows in track(_sizes(chosen, shapes, args.max_rows), "measuring"):
            for case in entry.cases(shapes, rows):
                ours = served(case, shapes.device)
                results.append(measure(case, clock, args.repeats, shapes.device, ours))
    finally:
        # Whatever ends it, what was measured is not lost.
        if results:
            beside = notes(chosen, shapes, args.max_rows)
            report(_by_name(results), machine, beside, args.out)
    return 1 if any(result.wrong for result in results) else 0


def notes(chosen: Sequence[Entry], shapes: Shapes, max_rows: int | None) -> list[str]:
    """What a reader must know beside the figures."""
    lines = [shapes.setting]
    if shapes.device.type == "cpu":
        lines.append(_ON_A_CPU)
    absent = missing(shapes.device)
    if absent is not None:
        lines.append(f"Without figures of vLLM's: {absent}.")
    lines += [entry.note for entry in chosen if entry.note]
    for entry in chosen:
        left_out = shapes.left_out(entry.width(shapes), max_rows)
        if left_out:
            sizes = ", ".join(f"{rows}" for rows in left_out)
            most = f"{shapes.most_bytes / 2**20:.0f} MiB"
            lines.append(f"{entry.name}: not with {sizes} rows, an input of more than {most}.")
    return lines


def _sizes(
    chosen: Sequence[Entry], shapes: Shapes, max_rows: int | None
) -> list[tuple[Entry, int]]:
    return [
        (entry, rows) for entry in chosen for rows in shapes.sweep(entry.width(shapes), max_rows)
    ]


def _by_name(results: Sequence[Result]) -> list[Result]:
    """One operation's lines together, in the order of their first."""
    names = list(dict.fromkeys(result.name for result in results))
    return sorted(results, key=lambda result: names.index(result.name))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [entry.name for entry in OPERATIONS]
    parser = argparse.ArgumentParser(prog="python -m sluice.kernels.bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and PNG")
    parser.add_argument(
        "--ops", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help=f"of each time, at least {LEAST_REPEATS}"
    )
    parser.add_argument("--max-rows", type=int, help="leave larger sizes out")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="the GPU where there is one",
    )
    args = parser.parse_args(arguments)
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}")
    if args.max_rows is not None and args.max_rows < 1:
        parser.error("--max-rows must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here")
    if args.device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: an interpreted kernel's time says nothing")
    return args


if __name__ == "__main__":
    sys.exit(main())
