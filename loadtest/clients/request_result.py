"""One request as its client saw it, and the ways it can end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ending = Literal["answered", "refused", "aborted", "hung", "lost"]
"""Whole answer; HTTP status from 400 on; the client left; no byte until the deadline; anything
else, such as a connection that broke or a stream that stopped short."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A request that was sent. Times are Unix seconds.

    Attributes:
        policy: name of its policy.
        prompt: what was asked.
        due: when it was to be sent, or None if as soon as its client was free.
        start: when it was sent.
        first: when its first token came, if one did.
        last: when its last token came.
        end: when nothing more was to come.
        tokens: that came.
        ending: how it ended.
        status: of HTTP, if an answer began.
        retry_after: whether a refusal said when to try again.
        detail: what is known of an ending that is no answer.
    """

    policy: str
    prompt: str
    due: float | None
    start: float
    first: float | None
    last: float | None
    end: float
    tokens: int
    ending: Ending
    status: int | None = None
    retry_after: bool = False
    detail: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None else self.first - self.start

    @property
    def gap(self) -> float | None:
        """Mean seconds between tokens after the first, or None without two."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def latency(self) -> float:
        """Seconds from sending to the end."""
        return self.end - self.start
