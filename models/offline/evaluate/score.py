"""Scores of answers: exact match per task, the average of tasks, and how sure both are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sluice.models.offline.intervals import share_interval
from sluice.models.profile.values import Interval

if TYPE_CHECKING:
    from rich.table import Table


class Question(Protocol):
    """A question with its right answer, as the demo's items and calibration examples are."""

    @property
    def prompt(self) -> str | None:
        """The question, or None if it is a conversation or a text."""

    @property
    def answer(self) -> str | None:
        """The right answer."""


QuestionT = TypeVar("QuestionT", bound=Question)


@dataclass(frozen=True)
class TaskScore:
    """Outcome on one task.

    An item is right if its answer is the right one word for word, or, of an item with choices, if
    the likeliest choice is.

    Attributes:
        task: its name.
        right: whether each item is, in order.
        misses: each failed item with what was answered instead.
    """

    task: str
    right: tuple[bool, ...]
    misses: tuple[tuple[Any, str], ...] = ()

    @property
    def items(self) -> int:
        """How many there are."""
        return len(self.right)

    @property
    def correct(self) -> int:
        """How many of them are right."""
        return sum(self.right)

    @property
    def exact_match(self) -> float:
        """Share of items answered exactly, between 0 and 1."""
        return self.correct / self.items

    @property
    def interval(self) -> Interval:
        """The same with Wilson's 95 % interval."""
        return share_interval(self.exact_match, self.items)


def score(
    items: Mapping[str, Sequence[QuestionT]], given: Mapping[str, Sequence[str]]
) -> dict[str, TaskScore]:
    """Compare answers with the right ones.

    White space around an answer, and around the right one, does not count.

    Args:
        items: by task.
        given: answers to the items of each task, in their order.
    """
    scores = {}
    for task, group in items.items():
        pairs = [*zip(group, (text.strip() for text in given[task]), strict=True)]
        right = tuple(text == (item.answer or "").strip() for item, text in pairs)
        misses = tuple(pair for pair, hit in zip(pairs, right, strict=True) if not hit)
        scores[task] = TaskScore(task, right, misses)
    return scores


def average(scores: Mapping[str, TaskScore]) -> float:
    """Mean exact match of the tasks, each counting the same."""
    return sum(entry.exact_match for entry in scores.values()) / len(scores)


def average_interval(scores: Mapping[str, TaskScore]) -> Interval:
    """The same with Wilson's 95 % interval.

    Tasks of equal size are one sample of all their items. Of other sizes, the mean of the tasks is
    as uncertain as the share of ``tasks^2 / sum(1 / items)`` items, rounded down, would be.
    """
    inverse = sum(1 / entry.items for entry in scores.values())
    # Rounding may make the sum of inverses a little too large.
    items = math.floor(len(scores) ** 2 / inverse + 1e-6)
    return share_interval(average(scores), items)


def worst(scores: Mapping[str, TaskScore]) -> TaskScore:
    """The task with the lowest exact match, the first of equals."""
    return min(scores.values(), key=lambda entry: entry.exact_match)


def percent(share: float) -> str:
    """A share between 0 and 1 as text, in percent."""
    return f"{100 * share:.1f} %"


def span(interval: Interval) -> str:
    """An interval of shares as text, in percent."""
    return f"{100 * interval.low:.1f}-{100 * interval.high:.1f}"


def table(
    scores: Mapping[str, TaskScore], title: str = "exact match", bar: float | None = None
) -> Table:
    """Lay the scores out for a terminal, with one miss per task as an example.

    Args:
        scores: by task.
        title: over the table.
        bar: shares that reach it are green and others red; without one there are no colours.
    """
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=title)
    out.add_column("task")
    out.add_column("correct", justify="right")
    out.add_column("exact match", justify="right")
    out.add_column("95 % interval", justify="right")
    out.add_column("a miss: prompt / right / given")
    for entry in scores.values():
        example = ""
        if entry.misses:
            item, given = entry.misses[0]
            example = escape(f"{_question(item)} / {item.answer} / {given}")
        share = percent(entry.exact_match)
        if bar is not None:
            share = f"[{'green' if entry.exact_match >= bar else 'red'}]{share}[/]"
        counted = f"{entry.correct}/{entry.items}"
        out.add_row(escape(entry.task), counted, share, span(entry.interval), example)
    return out


def _question(item: Any) -> str:
    """Text of a question; of a conversation, its last message."""
    if item.prompt is not None:
        return str(item.prompt)
    return str(item.text if item.text is not None else item.messages[-1].content)
