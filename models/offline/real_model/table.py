"""Joins quality and speed into one JSON file, and lays it out as a table in Markdown.

``python -m sluice.models.offline.real_model.table --quality FILE --speed FILE --json FILE
--document FILE`` writes the JSON file, and the table between the marks of the document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sluice.models.offline.real_model.quality import FULL_DEPTH

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
"""Marks in the document."""

NO_ROUTING = "no routing"
_NONE = ""


def joined(quality: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Any]:
    """One object of both measurements.

    Args:
        quality: as `sluice.models.offline.real_model.quality` writes it.
        speed: as `sluice.loadtest.comparison` writes it.

    Returns:
        What both are of, and `policies`: by name its quality, and under `speed` its times
        and ratios to stock vLLM by batch.
    """
    ratios: dict[str, dict[str, Any]] = {}
    for row in speed["rows"]:
        entry = {name: value for name, value in row.items() if name not in ("policy", "batch")}
        ratios.setdefault(row["policy"], {})[str(row["batch"])] = entry
    ratios[FULL_DEPTH] = ratios.get(NO_ROUTING, {})
    policies = {
        name: {**measured, "speed": ratios.get(name, {})}
        for name, measured in quality["policies"].items()
    }
    timing = {name: value for name, value in speed.items() if name != "rows"}
    asked = {name: value for name, value in quality.items() if name != "policies"}
    return {"quality": asked, "speed": timing, "policies": policies}


def table(found: Mapping[str, Any]) -> str:
    """The rows in Markdown, one for each policy.

    Args:
        found: as `joined` gives it.
    """
    batches = [*found["policies"][FULL_DEPTH]["speed"]]
    heads = ["policy", "choices", "to full depth", "answers", "agreement", "compute"]
    heads += [f"speed, batch {batch}" for batch in batches]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, measured in found["policies"].items():
        speeds = [measured["speed"].get(batch) for batch in batches]
        cells = [
            name,
            _percent(measured["choices"]),
            _difference(measured["choices"]) if name != FULL_DEPTH else _NONE,
            _percent(measured["answers"]),
            _percent(measured["agreement"]),
            f"{100 * measured['compute_fraction']:.0f} %",
            *(_NONE if each is None else _ratio(each["decode_ratio"]) for each in speeds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: Mapping[str, Any] | None) -> str:
    """A share with its interval."""
    if share is None:
        return _NONE
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['value']:.1f} % ({low:.0f}-{high:.0f})"


def _difference(share: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in points."""
    if share is None:
        return _NONE
    each = share["difference"]
    value, low, high = (100 * each[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _ratio(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.2f} ({interval['low']:.2f}-{interval['high']:.2f})"


def with_table(document: str, rows: str) -> str:
    """A document with new rows between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.real_model.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quality", type=Path, required=True, help="JSON file to read")
    parser.add_argument("--speed", type=Path, required=True, help="JSON file to read")
    parser.add_argument("--json", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--document", type=Path, required=True, help="Markdown file to change")
    args = parser.parse_args()
    quality, speed = (json.loads(path.read_text()) for path in (args.quality, args.speed))
    found = joined(quality, speed)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    document = args.document.read_text(encoding="utf-8")
    args.document.write_text(with_table(document, table(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
