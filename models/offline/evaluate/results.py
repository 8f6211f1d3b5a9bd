"""What a policy answered right, and the work and time it took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sluice.models.offline.evaluate.score import (
    TaskScore,
    average,
    average_interval,
    worst,
)
from sluice.models.offline.evaluate.work import Work


@dataclass(frozen=True)
class Times:
    """What the requests of one policy took.

    Attributes:
        requests: seconds of each item's requests, in the order of the items.
        generated_tokens: of all answers; choices generate none.
        answering: seconds in which these were generated, all requests together.
    """

    requests: tuple[float, ...]
    generated_tokens: int
    answering: float

    @property
    def per_item(self) -> float:
        """Median seconds of an item."""
        return statistics.median(self.requests)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all answers together, or None if there was none."""
        return self.generated_tokens / self.answering if self.generated_tokens else None

    def to_wire(self) -> dict[str, float | None]:
        """As JSON values."""
        return {
            "seconds_per_item": self.per_item,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class PolicyResult:
    """One policy on all tasks.

    Attributes:
        policy: its name.
        routing: `routing` object that asks for it.
        scores: by task.
        work: from reports, or None if the answers carried none.
        warnings: what a reader of the scores must know, a sentence each.
        times: of the requests, or None if nobody took them.
    """

    policy: str
    routing: Mapping[str, Any]
    scores: Mapping[str, TaskScore]
    work: Work | None
    warnings: tuple[str, ...] = ()
    times: Times | None = None

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
            **({} if self.times is None else self.times.to_wire()),
        }
