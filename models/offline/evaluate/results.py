"""Policies side by side: what each answered right, and the work it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sluice.models.offline.evaluate.score import (
    TaskScore,
    average,
    average_interval,
    percent,
    span,
    table,
    worst,
)
from sluice.models.offline.evaluate.work import Work

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TASK_COLUMNS = 5
"""Tasks beside each other that fit a terminal of 80 columns."""
_UNKNOWN = "-"


@dataclass(frozen=True)
class PolicyResult:
    """One policy on all tasks.

    Attributes:
        policy: its name.
        routing: `routing` object that asks for it.
        scores: by task.
        work: from reports, or None if the answers carried none.
        warnings: what a reader of the scores must know, a sentence each.
    """

    policy: str
    routing: Mapping[str, Any]
    scores: Mapping[str, TaskScore]
    work: Work | None
    warnings: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """As JSON values; shares are between 0 and 1, intervals are of 95 %."""
        lowest, whole = worst(self.scores), average_interval(self.scores)
        intervals = {task: entry.interval for task, entry in self.scores.items()}
        return {
            "policy": self.policy,
            "routing": dict(self.routing),
            "exact_match": average(self.scores),
            "interval": [whole.low, whole.high],
            "worst_task": {"task": lowest.task, "exact_match": lowest.exact_match},
            "tasks": {task: entry.exact_match for task, entry in self.scores.items()},
            "intervals": {task: [each.low, each.high] for task, each in intervals.items()},
            "items": {task: entry.items for task, entry in self.scores.items()},
            "warnings": list(self.warnings),
            **({} if self.work is None else asdict(self.work)),
        }


def show(
    results: Sequence[PolicyResult],
    console: Console,
    title: str = "exact match",
    bar: float | None = None,
) -> None:
    """Print results: of one policy a row per task, of several a row each.

    Args:
        results: at least one.
        console: to print on.
        title: what was measured.
        bar: see `table`.
    """
    if len(results) == 1:
        console.print(table(results[0].scores, title, bar))
        console.print(averages(results[0]), markup=False)
        return
    console.print(comparison(results, f"{title} and the work it took"))
    tasks = list(results[0].scores)
    if len(tasks) == 1:
        return
    for start in range(0, len(tasks), _TASK_COLUMNS):
        console.print(_by_task(results, tasks[start : start + _TASK_COLUMNS], f"{title} per task"))


def comparison(results: Sequence[PolicyResult], title: str = "exact match and its work") -> Table:
    """Lay policies out for a terminal, a row each; the 95 % interval is under the share."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=title)
    out.add_column("policy", overflow="fold")
    for heading in (
        "exact\nmatch",
        "worst\ntask",
        "layers\nper token",
        "compute,\ngenerated",
        "compute,\nall tokens",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        lowest = worst(result.scores)
        share, interval = average(result.scores), average_interval(result.scores)
        out.add_row(
            escape(result.policy),
            f"{percent(share)}\n{span(interval)}",
            f"{escape(lowest.task)}\n{percent(lowest.exact_match)}",
            *_work_cells(result.work),
        )
    return out


def averages(result: PolicyResult) -> str:
    """What the row of `comparison` says, as a line of text."""
    interval = average_interval(result.scores)
    quality = (
        f"{result.policy}: average exact match {percent(average(result.scores))} "
        f"(95 % interval {span(interval)})"
    )
    if result.work is None:
        return quality
    layers, generated, whole = _work_cells(result.work)
    if result.work.mean_layers is None:
        return f"{quality}, {whole} of full depth's compute"
    return (
        f"{quality}, {layers} layers per generated token, "
        f"{generated} of full depth's compute on generated tokens, {whole} on all"
    )


def _work_cells(work: Work | None) -> tuple[str, str, str]:
    """Layers per generated token, share of compute on those, and on all tokens."""
    if work is None:
        return (_UNKNOWN, _UNKNOWN, _UNKNOWN)
    if work.mean_layers is None or work.generated_compute_fraction is None:
        return (_UNKNOWN, _UNKNOWN, percent(work.compute_fraction))
    return (
        f"{work.mean_layers:.2f}",
        percent(work.generated_compute_fraction),
        percent(work.compute_fraction),
    )


def _by_task(results: Sequence[PolicyResult], tasks: Sequence[str], title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=title)
    out.add_column("policy", overflow="fold")
    for task in tasks:
        out.add_column(escape(task), justify="right", overflow="fold")
    for result in results:
        shares = (percent(result.scores[task].exact_match) for task in tasks)
        out.add_row(escape(result.policy), *shares)
    return out
