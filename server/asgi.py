"""The path of a request, as the router sees it."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope


def _is_json_post(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    kind = Headers(scope=scope).get("content-type", "").lower()
    return not kind or "json" in kind


async def _read_body(receive: Receive) -> tuple[bytes, bool]:
    """The whole body, and whether the client left before it was there."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"", True
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts), False


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then listens for the disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def route_path(scope: Scope) -> str:
    """Path below the app's root.

    It is the router's own function: a guard that strips the root in any other way (a root of `/`
    is enough) reads another path than the one that is served.
    """
    return get_route_path(scope)
