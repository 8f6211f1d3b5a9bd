"""Policies side by side on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from support.scores import scored

from sluice.models.offline.evaluate.results import PolicyResult, Times
from sluice.models.offline.evaluate.score import TaskScore
from sluice.models.offline.evaluate.tables import averages, comparison, show
from sluice.models.offline.evaluate.work import Work

SCORES = {"copy": scored("copy", 4, 4), "sort": scored("sort", 4, 3)}
WORK = Work(100, 5.25, 0.656, 0.8)


def shown(*results: PolicyResult, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    show(results, console)
    return console.export_text()


def test_a_row_per_policy() -> None:
    results = [PolicyResult(name, {}, SCORES, WORK) for name in ("none", "[b]")]
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(comparison(results))
    lines = console.export_text().splitlines()
    for name in ("none", "[b]"):
        first = next(place for place, line in enumerate(lines) if name in line)
        for cell in ("87.5 %", "sort", "5.25", "65.6 %", "80.0 %"):
            assert cell in lines[first]
        for cell in ("52.9-97.8", "75.0 %"):
            assert cell in lines[first + 1]


def test_policies_are_shown_task_by_task_too() -> None:
    tasks = {f"task-{n}": scored(f"task-{n}", 10, n) for n in range(7)}
    text = shown(*(PolicyResult(name, {}, tasks, None) for name in ("a", "b")), width=80)
    for n in range(7):
        assert text.count(f"task-{n}") == (3 if n == 0 else 1)
        assert text.count(f" {10 * n}.0 %") >= 2


def test_several_policies_are_held_against_the_first() -> None:
    times = [Times((2.0, 4.0), 30, 1.5), Times((1.0, 2.0), 0, 1.0)]
    scores = [{"a": TaskScore("a", right)} for right in ((True, True), (True, False))]
    results = [
        PolicyResult(name, {}, score, None, times=time)
        for name, score, time in zip(("none", "[b]"), scores, times, strict=True)
    ]
    lines = shown(*results, width=80).splitlines()
    start = next(place for place, line in enumerate(lines) if "against none" in line)
    reference, other = (
        next(line for line in lines[start + 1 :] if name in line) for name in ("none", "[b]")
    )
    assert [cell in reference for cell in ("20.0", "3.00")] == [True, True]
    assert all(cell in other for cell in ("-50.0", "+0 -1", "1.000", "1.50", "2.00"))


def test_one_policy_is_shown_by_its_tasks() -> None:
    text = " ".join(shown(PolicyResult("none", {}, SCORES, WORK)).split())
    assert "3/4" in text
    assert averages(PolicyResult("none", {}, SCORES, WORK)) in text


@pytest.mark.parametrize(
    ("work", "more"),
    [
        (
            WORK,
            ", 5.25 layers per generated token, 65.6 % of full depth's compute on generated "
            "tokens, 80.0 % on all",
        ),
        (Work(0, None, None, 0.5), ", 50.0 % of full depth's compute"),
        (None, ""),
    ],
)
def test_a_policy_in_a_line(work: Work | None, more: str) -> None:
    timed = averages(PolicyResult("none", {}, SCORES, work, times=Times((1.0, 3.0), 30, 1.5)))
    assert timed.endswith(f"{more}, 20.0 tokens/s, 2.00 s per item")
    said = averages(PolicyResult("none", {}, SCORES, work))
    assert said == f"none: average exact match 87.5 % (95 % interval 52.9-97.8){more}"
