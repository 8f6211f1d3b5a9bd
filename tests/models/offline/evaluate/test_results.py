"""Policies side by side on a terminal, and as JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sluice.models.offline.evaluate.results import PolicyResult, averages, comparison, show
from sluice.models.offline.evaluate.score import TaskScore
from sluice.models.offline.evaluate.work import Work

SCORES = {"copy": TaskScore("copy", 4, 4, ()), "sort": TaskScore("sort", 4, 3, ())}
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
    tasks = {f"task-{n}": TaskScore(f"task-{n}", 10, n, ()) for n in range(7)}
    text = shown(*(PolicyResult(name, {}, tasks, None) for name in ("a", "b")), width=80)
    for n in range(7):
        assert text.count(f"task-{n}") == (3 if n == 0 else 1)
        assert text.count(f" {10 * n}.0 %") >= 2


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
    said = averages(PolicyResult("none", {}, SCORES, work))
    assert said == f"none: average exact match 87.5 % (95 % interval 52.9-97.8){more}"


def test_a_row_as_json() -> None:
    wire = PolicyResult("p", {"preset": "p"}, SCORES, WORK, ("careful",)).to_wire()
    wire = json.loads(json.dumps(wire))
    assert wire["routing"] == {"preset": "p"}
    assert wire["exact_match"] == 0.875
    assert wire["interval"] == pytest.approx([0.529, 0.978], abs=1e-3)
    assert wire["worst_task"] == {"task": "sort", "exact_match": 0.75}
    assert wire["tasks"] == {"copy": 1.0, "sort": 0.75}
    assert wire["items"] == {"copy": 4, "sort": 4}
    assert wire["intervals"]["copy"] == pytest.approx([0.510, 1.0], abs=1e-3)
    assert wire["warnings"] == ["careful"]
    assert (wire["generated_tokens"], wire["mean_layers"]) == (100, 5.25)
    assert "mean_layers" not in PolicyResult("p", {}, SCORES, None).to_wire()
