"""`python -m sluice.models.offline.bench`: prints the table and writes JSON and PNG."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from sluice.models.offline.bench.expert_rows import expert_rows
from sluice.models.offline.bench.measure import measure
from sluice.models.offline.bench.plans import RecordedPlans
from sluice.models.offline.bench.report import report
from sluice.models.offline.bench.rows import depth_rows


def main() -> None:
    """Run the chosen rows."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.json and .png")
    parser.add_argument("--repeats", type=int, default=6, help="pairs per row, at least 5")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="both engines with torch.compile")
    args = parser.parse_args()
    if find_spec("matplotlib") is None:  # It is used at the very end.
        parser.error('matplotlib not installed: pip install "vllm-sluice[bench]"')
    if args.repeats < 5:
        parser.error("--repeats must be at least 5")
    rows = (*depth_rows(RecordedPlans.load()), *expert_rows())
    chosen = [row for row in rows if args.rows in row.name]
    if not chosen:
        parser.error(f"no row's name contains {args.rows!r}")
    results, parameters = measure(chosen, args.repeats, eager=not args.compiled)
    report(results, parameters, args.out, eager=not args.compiled)


if __name__ == "__main__":
    main()
