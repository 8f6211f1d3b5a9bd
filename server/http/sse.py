"""The response's `routing` object, and where it goes in an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def is_usage_chunk(event: bytes) -> bool:
    """True for the server-sent event that closes a stream with usage and no choices."""
    if not event.startswith(b"data: {") or b'"usage"' not in event:
        return False
    chunk = json.loads(event.removeprefix(b"data: "))
    return bool(chunk.get("usage")) and chunk.get("choices") == []


def with_report(payload: bytes, report: dict[str, Any]) -> bytes:
    """Add `routing` to a JSON answer or to a server-sent event holding one."""
    prefix = b"data: " if payload.startswith(b"data: ") else b""
    answer = json.loads(payload.removeprefix(prefix))
    body = json.dumps({**answer, "routing": report}, ensure_ascii=False, separators=(",", ":"))
    return prefix + body.encode() + (b"\n\n" if prefix else b"")


class EventSplitter:
    """Cuts a byte stream into server-sent events; keeps an unfinished one for the next chunk."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Whole events, each with its closing blank line."""
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        yield from (event + b"\n\n" for event in events)

    def flush(self) -> bytes:
        """What is left when the stream ends."""
        rest, self._rest = self._rest, b""
        return rest
