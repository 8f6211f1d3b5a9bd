"""A body over the limit: refused before it is read, or as soon as it has come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from sluice.server.http.body_limit import BodyLimitMiddleware

LIMIT = 10


def answered(chunks: list[bytes], length: int | None = None) -> tuple[int, Any, int]:
    """Status and body of the answer to a request, and how many chunks were read before it."""
    left = [*chunks]
    unread = len(chunks)
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1"})

    async def receive() -> Message:
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message: Message) -> None:
        nonlocal unread
        unread = unread if sent else len(left)
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/nowhere", "headers": headers}
    asyncio.run(BodyLimitMiddleware(app, LIMIT)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), len(chunks) - unread


def test_the_rest_of_a_refused_body_is_dropped() -> None:
    """Else a client that is still sending finds a reset connection and no answer."""
    left = [b"x" * 6, b"x" * 6, b"x", b"x"]
    sent: list[Message] = []

    async def receive() -> Message:
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            await receive()

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimitMiddleware(app, LIMIT)(scope, receive, send))
    assert left == []
    assert [message.get("more_body") for message in sent] == [None, True, False]


def test_a_body_at_the_limit_passes() -> None:
    assert answered([b"12345", b"67890"], LIMIT) == (200, 1, 2)


def test_a_known_length_is_refused_unread() -> None:
    status, answer, read = answered([b"x" * 11], LIMIT + 1)
    assert (status, read) == (413, 0)
    assert answer["error"]["code"] == 413
    assert "--max-body-bytes" in answer["error"]["message"]


@pytest.mark.parametrize("length", [None, 5])
def test_what_comes_is_counted(length: int | None) -> None:
    """A client may name no length, or one that is too small."""
    status, _, read = answered([b"12345", b"678901", b"never read"], length)
    assert (status, read) == (413, 2)


def test_a_route_that_reads_the_body_itself_answers_413_too() -> None:
    """FastAPI turns whatever a body raises into a 400."""
    app = FastAPI(middleware=[Middleware(BodyLimitMiddleware, limit=LIMIT)])

    @app.post("/x")
    async def route(body: dict[str, Any]) -> None:
        raise AssertionError

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"a": "0123456789"}', "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("127.0.0.1", 1)}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413
