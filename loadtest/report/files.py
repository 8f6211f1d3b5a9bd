"""A run as files: JSON, two tables as CSV, and a page."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.report.page import report_page
from sluice.loadtest.report.results import Results, Row
from sluice.loadtest.report.summary import PERCENTILES, TIMES
from sluice.loadtest.report.verdict import overall_verdict, verdicts

_SCHEMA = 1


def write_report(results: Results, out: Path) -> None:
    """Write `report.json`, `report.csv`, `requests.csv` and `report.html` into a folder.

    Raises:
        OSError: it cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    wire = json.dumps(to_wire(results), indent=2, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(wire + "\n", encoding="utf-8")
    _write_csv(out / "report.csv", [flat(row) for row in results.rows()])
    requests = [
        {"round": phase.round, "turn": phase.turn, "stage": phase.stage, **asdict(each)}
        for result in results.phases
        for phase in [result.phase]
        for each in result.requests
    ]
    names = ["round", "turn", "stage", *(field.name for field in fields(RequestResult))]
    _write_csv(out / "requests.csv", requests, names)
    (out / "report.html").write_text(report_page(results), encoding="utf-8")


def to_wire(results: Results) -> dict[str, Any]:
    """Everything but the requests themselves."""
    slope = results.memory_slope()
    memory = results.memory
    return {
        "schema_version": _SCHEMA,
        "scenario": results.scenario.model_dump(mode="json"),
        "url": results.url,
        "model": results.model,
        "rate": results.rate,
        "versions": results.versions,
        "date": results.date,
        "hardware": results.hardware,
        "verdict": asdict(overall_verdict(results)),
        "verdicts": [asdict(verdict) for verdict in verdicts(results)],
        "rows": [
            {
                **asdict(row.phase),
                "policy": row.policy,
                **asdict(row.summary),
                "throughput": row.summary.throughput,
                "answers_per_second": row.summary.answer_rate,
                "goodput": row.summary.goodput,
            }
            for row in results.rows()
        ],
        "ratios": {
            "goodput": [asdict(each) for each in results.ratios(lambda summary: summary.goodput)],
            "throughput": [
                asdict(each) for each in results.ratios(lambda summary: summary.throughput)
            ],
        },
        "throughput_kept": results.throughput_kept(),
        "scrapes": {
            "count": len(results.scrapes),
            **{f"p{rank}_ms": results.scrape_ms(rank) for rank in (50, 99)},
        },
        "left": {**results.left, "seconds": results.idle_seconds},
        "memory": None
        if memory is None
        else {
            "slope": None if slope is None else asdict(slope),
            "times": memory.times,
            "resident_mb": memory.values,
        },
        "metrics": [
            {
                "name": change.series.name,
                "labels": dict(change.series.labels),
                "before": change.before,
                "after": change.after,
                "delta": change.delta,
            }
            for change in results.changes
        ],
    }


def flat(row: Row) -> dict[str, Any]:
    """A row of the report in one line of a table."""
    summary = row.summary
    endings = "; ".join(f"{count} {ending}" for ending, count in summary.endings.items())
    return {
        **asdict(row.phase),
        "policy": row.policy,
        "requests": summary.requests,
        "answered": summary.answered,
        "good": summary.good,
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "throughput": summary.throughput,
        "answers_per_second": summary.answer_rate,
        "goodput": summary.goodput,
        "late_ms": summary.late_ms,
        **{
            f"{name}_p{rank}": summary.times.get(name, {}).get(f"p{rank}")
            for name in TIMES
            for rank in PERCENTILES
        },
        "endings": endings,
    }


def _write_csv(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names or list(rows[0]) if rows else names or [])
        writer.writeheader()
        writer.writerows(rows)
