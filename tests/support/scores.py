"""Scores without items."""

from __future__ import annotations

from sluice.models.offline.evaluate.score import TaskScore


def scored(task: str, items: int, correct: int) -> TaskScore:
    """The first `correct` of a task's items are right."""
    return TaskScore(task, tuple(n < correct for n in range(items)))
