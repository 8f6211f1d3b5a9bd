"""What our ASGI middlewares read of a request: its path, its kind and its body."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope


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
