"""Right and wrong answers, their average and its interval, and the table of tasks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from scipy.stats import binomtest
from support.scores import scored

from sluice.models.offline.evaluate.score import (
    average,
    average_interval,
    score,
    table,
    worst,
)
from sluice.models.offline.hf_model.examples import Example, Message


def wilson(correct: int, items: int) -> tuple[float, float]:
    found = binomtest(correct, items).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def example(answer: str) -> Example:
    return Example(prompt="?", answer=answer)


def test_white_space_around_an_answer_does_not_count() -> None:
    items = {"a": [example("x y"), example(" z "), example("w")]}
    found = score(items, {"a": [" x y\n", "z", "w w"]})["a"]
    assert (found.items, found.correct) == (3, 2)
    assert found.misses == ((items["a"][2], "w w"),)


def test_answers_belong_to_the_items_in_their_place() -> None:
    items = {"a": [example("1"), example("2")], "b": [example("1")]}
    scores = score(items, {"a": ["2", "1"], "b": ["1"]})
    assert [scores[task].exact_match for task in "ab"] == [0.0, 1.0]


@pytest.mark.parametrize("counts", [(7, 10), (0, 4), (9, 9)])
def test_of_one_task_the_interval_is_wilsons(counts: tuple[int, int]) -> None:
    correct, items = counts
    one = {"a": scored("a", items, correct)}
    for interval in (one["a"].interval, average_interval(one)):
        assert (interval.low, interval.high) == pytest.approx(wilson(correct, items), abs=1e-9)
        assert interval.value == correct / items


def test_tasks_of_equal_size_are_one_sample() -> None:
    scores = {name: scored(name, 20, n) for name, n in (("a", 20), ("b", 13), ("c", 2))}
    interval = average_interval(scores)
    assert interval.value == average(scores) == pytest.approx(35 / 60)
    assert (interval.low, interval.high) == pytest.approx(wilson(35, 60), abs=1e-9)
    assert worst(scores).task == "c"


def test_a_small_task_makes_the_average_uncertain() -> None:
    """Of 1000 and 10 items, half of each right: as 2^2 / (1/1000 + 1/10) = 39 items."""
    scores = {"a": scored("a", 1000, 500), "b": scored("b", 10, 5)}
    interval = average_interval(scores)
    found = binomtest(39, 78).proportion_ci(0.95, method="wilson")
    assert interval.high - interval.low > found.high - found.low
    z = 1.959963984540054
    half = z * (0.25 / 39 + z * z / (4 * 39 * 39)) ** 0.5 / (1 + z * z / 39)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, abs=1e-9)


def test_a_table_shows_every_task_and_a_miss() -> None:
    said = Example(messages=(Message(role="user", content="[b]who?"),), answer="me")
    read = Example(text="[i]once", answer="upon")
    scores = score({"chat": [said], "read": [read, read]}, {"chat": ["you"], "read": ["upon", ""]})
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(table(scores))
    rows = {line.split()[1]: line for line in console.export_text().splitlines() if "/" in line}
    assert "[b]who? / me / you" in rows["chat"]
    assert "0/1" in rows["chat"]
    assert "0.0-79.3" in rows["chat"]
    assert "[i]once / upon /" in rows["read"]
    assert "50.0 %" in rows["read"]


def test_a_bar_colours() -> None:
    scores = {"a": scored("a", 2, 1), "b": scored("b", 2, 2)}
    for bar, codes in ((0.95, {"31", "32"}), (None, set())):
        file = io.StringIO()
        Console(file=file, width=100, force_terminal=True, color_system="standard").print(
            table(scores, bar=bar)
        )
        found = {code for code in ("31", "32") if f"\x1b[{code}m" in file.getvalue()}
        assert found == codes
