"""What our ASGI middlewares do with a request: its path, its kind, its body, and refusing it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_MOST_DROPPED_BYTES = 32 * 1024**2
_MOST_DROPPING_SECONDS = 5.0


def route_path(scope: Scope) -> str:
    """Path of a request below the app's root, as the router sees it.

    This is the router's own function. A guard that strips the root in any other way (a root of `/`
    is enough) would check another path than the one that is served.
    """
    return get_route_path(scope)


def is_json_post(scope: Scope) -> bool:
    """Whether this is a POST whose body may be JSON; one without a content type may be."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    content_type = Headers(scope=scope).get("content-type", "").lower()
    return not content_type or "json" in content_type


async def read_body(receive: Receive) -> bytes | None:
    """The whole body of a request, or None if the client left before all of it was there."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then waits for the client to disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def refuse(answer: Response, receive: Receive, send: Send) -> None:
    """Answer an HTTP request without reading its body, then drop what comes of that.

    uvicorn closes the connection after an answer if the client wants it closed. If a part of the
    body is still on its way then, the client finds a reset connection instead of the answer.
    """
    headers = answer.raw_headers
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(_MOST_DROPPING_SECONDS):
            await _drop_body(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop_body(receive: Receive) -> None:
    left = _MOST_DROPPED_BYTES
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return
