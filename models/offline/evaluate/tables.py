"""Policies side by side on a terminal: what each answered right, and the work and time it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sluice.models.offline.evaluate.paired import differences
from sluice.models.offline.evaluate.results import PolicyResult, Times
from sluice.models.offline.evaluate.score import (
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
    console.print(_differences(results))
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
    return f"{quality}{_work_words(result.work)}{_time_words(result.times)}"


def _work_words(work: Work | None) -> str:
    if work is None:
        return ""
    layers, generated, whole = _work_cells(work)
    if work.mean_layers is None:
        return f", {whole} of full depth's compute"
    return (
        f", {layers} layers per generated token, "
        f"{generated} of full depth's compute on generated tokens, {whole} on all"
    )


def _time_words(times: Times | None) -> str:
    if times is None:
        return ""
    rate = times.tokens_per_second
    words = "" if rate is None else f", {rate:.1f} tokens/s"
    return f"{words}, {times.per_item:.2f} s per item"


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


def _differences(results: Sequence[PolicyResult]) -> Table:
    """How the policies differ from the first one, and what their requests took."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=f"against {escape(results[0].policy)}, item by item")
    out.add_column("policy", overflow="fold")
    for heading in (
        "points",
        "items\n+ and -",
        "p",
        "tokens/s",
        "s per\nitem",
        "times\nas fast",
    ):
        out.add_column(heading, justify="right", no_wrap=True)
    reference, *others = results
    out.add_row(escape(reference.policy), *[_UNKNOWN] * 3, *_time_cells(reference.times), _UNKNOWN)
    for result, found in zip(others, differences(results), strict=True):
        points, faster = found.exact_match, found.faster
        out.add_row(
            escape(result.policy),
            f"{100 * points.value:+.1f}\n{100 * points.low:+.1f} to {100 * points.high:+.1f}",
            f"+{found.gained} -{found.lost}",
            f"{found.p_value:.3f}",
            *_time_cells(result.times),
            _UNKNOWN
            if faster is None
            else f"{faster.value:.2f}\n{faster.low:.2f}-{faster.high:.2f}",
        )
    return out


def _time_cells(times: Times | None) -> tuple[str, str]:
    """Tokens per second, and median seconds of an item."""
    if times is None:
        return (_UNKNOWN, _UNKNOWN)
    rate = times.tokens_per_second
    return (_UNKNOWN if rate is None else f"{rate:.1f}", f"{times.per_item:.2f}")


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
