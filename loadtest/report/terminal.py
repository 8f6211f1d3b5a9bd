"""A run as tables on the terminal."""

from __future__ import annotations

from pathlib import Path

from sluice.loadtest.report.results import Results
from sluice.loadtest.report.verdict import overall_verdict, verdicts


def print_table(results: Results, folder: Path) -> None:
    """Print the phases and the bars, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=132)
    table = Table(title=results.scenario.description)
    for name in ("turn", "policy", "endings"):
        table.add_column(name)
    for name in ("round", "stage", "tokens/s", "good/s", "TTFT p50", "p99", "e2e p50", "p99"):
        table.add_column(name, justify="right")
    for row in results.rows():
        summary = row.summary
        times = [
            summary.times.get(name, {}).get(rank)
            for name in ("ttft_ms", "e2el_ms")
            for rank in ("p50", "p99")
        ]
        table.add_row(
            row.phase.turn,
            row.policy,
            ", ".join(f"{count} {ending}" for ending, count in summary.endings.items()),
            str(row.phase.round + 1),
            f"{row.phase.stage:g}",
            f"{summary.throughput:.0f}",
            f"{summary.goodput:.1f}",
            *("-" if time is None else f"{time:.0f}" for time in times),
        )
    console.print(table)
    for verdict in verdicts(results):
        style = "green" if verdict.met else "red"
        console.print(f"[{style}]{'met   ' if verdict.met else 'missed'}[/] ", end="")
        console.print(f"{verdict.bar}: {verdict.found}", markup=False, highlight=False)
    overall = overall_verdict(results)
    style = "green" if overall.met else "red"
    console.print(f"[bold {style}]{overall.bar}[/]: ", end="")
    console.print(overall.found, markup=False, highlight=False)
    console.print(f"report: {folder / 'report.html'}", markup=False, highlight=False)
