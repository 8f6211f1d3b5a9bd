"""Server-sent events as vLLM writes them: `data`, with the event's name before it or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

_DATA = b"data: "
_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        head: what stands before the data, `data: ` included; all of it if there is no data.
        data: JSON, `[DONE]`, or nothing (a comment that keeps the connection).
    """

    head: bytes
    data: bytes

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Split an event without its closing blank line."""
        start = 0 if raw.startswith(_DATA) else raw.find(b"\n" + _DATA) + 1
        if start == 0 and not raw.startswith(_DATA):
            return cls(raw, b"")
        cut = start + len(_DATA)
        return cls(raw[:cut], raw[cut:])

    @property
    def name(self) -> bytes:
        """What stands after `event: `; empty without it."""
        first = self.head.partition(b"\n")[0]
        return first.removeprefix(b"event: ") if first.startswith(b"event: ") else b""

    def with_data(self, data: Any) -> Event:
        """The event with other data."""
        return Event(self.head, encoded_json(data))

    def encode(self) -> bytes:
        """The event with its closing blank line."""
        return self.head + self.data + _END


def encoded_json(data: Any) -> bytes:
    """JSON as vLLM's answers have it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


class EventSplitter:
    """Cuts a byte stream into server-sent events; keeps an unfinished one for the next chunk."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Whole events."""
        *events, self._rest = (self._rest + chunk).split(_END)
        yield from (Event.read(event) for event in events)

    def flush(self) -> bytes:
        """What is left when the stream ends."""
        rest, self._rest = self._rest, b""
        return rest
