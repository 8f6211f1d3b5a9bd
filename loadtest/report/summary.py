"""What many requests come to: percentiles, throughput, goodput, and counts of how they ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.workload.fields import Objectives

PERCENTILES = (50, 90, 95, 99)
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
"""Time to first token; time per output token after the first, over requests; the same over tokens;
end to end."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Numbers of a set of requests.

    Attributes:
        requests: that were sent.
        good: of them, answered within the objectives.
        tokens: that came, also of requests that were not answered to the end.
        seconds: from the first one sent to the last end.
        endings: number by ending; refusals by status, `503 with Retry-After` or without.
        times: milliseconds by measure and percentile, of answered requests; empty without any.
        late_ms: 99th percentile of how much later than due requests were sent, or None.
    """

    requests: int
    good: int
    tokens: int
    seconds: float
    endings: dict[str, int]
    times: dict[str, dict[str, float]]
    late_ms: float | None

    @property
    def answered(self) -> int:
        """Requests with a whole answer."""
        return self.endings.get("answered", 0)

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def answer_rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Good requests per second."""
        return self.good / self.seconds if self.seconds else 0.0


def summarize(requests: Sequence[RequestResult], objectives: Objectives, seconds: float) -> Summary:
    """Sum up requests that were sent within `seconds`."""
    answered = [each for each in requests if each.ending == "answered"]
    late = [each.start - each.due for each in requests if each.due is not None]
    return Summary(
        requests=len(requests),
        good=sum(is_good(each, objectives) for each in answered),
        tokens=sum(each.tokens for each in requests),
        seconds=seconds,
        endings=dict(sorted(Counter(ending_label(each) for each in requests).items())),
        times={name: _percentiles(*_values(answered, name)) for name in TIMES if answered},
        late_ms=1000 * float(np.percentile(late, 99)) if late else None,
    )


def window(requests: Iterable[RequestResult]) -> float:
    """Seconds from the first request sent to the last end; 0 without any."""
    results = list(requests)
    if not results:
        return 0.0
    return max(each.end for each in results) - min(each.start for each in results)


def ending_label(result: RequestResult) -> str:
    """How it ended, in words that the report counts."""
    if result.ending != "refused":
        return result.ending
    preposition = "with" if result.retry_after else "without"
    return f"{result.status} {preposition} Retry-After"


def is_good(result: RequestResult, objectives: Objectives) -> bool:
    """Whether it was answered within all objectives that are given."""
    if result.ending != "answered":
        return False
    # An answer of one token has no time per further token.
    seconds = {"ttft_ms": result.ttft, "tpot_ms": result.gap or 0.0, "e2el_ms": result.latency}
    for name, limit in objectives.model_dump(exclude_none=True).items():
        value = seconds[name]
        if value is None or 1000 * value > limit:
            return False
    return True


def _values(answered: Sequence[RequestResult], name: str) -> tuple[list[float], list[int]]:
    """Seconds of each request, and how often each counts."""
    if name == "ttft_ms":
        values = [(each.ttft, 1) for each in answered]
    elif name == "tpot_ms":
        values = [(each.gap, 1) for each in answered]
    elif name == "itl_ms":
        values = [(each.gap, each.tokens - 1) for each in answered]
    else:
        values = [(each.latency, 1) for each in answered]
    kept = [(value, count) for value, count in values if value is not None]
    return [value for value, _ in kept], [count for _, count in kept]


def _percentiles(seconds: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    if not seconds:
        return {}
    repeated = np.repeat(1000 * np.asarray(seconds), counts)
    values = np.percentile(repeated, PERCENTILES)
    return {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, values, strict=True)}
