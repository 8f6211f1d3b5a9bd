"""Middleware that limits open requests, and tells refused clients when to try again.

vLLM's own limits (`--max-num-queued-reqs`, `--max-num-queued-tokens`) count requests that the
engine has taken already. When many come at once, more get in than the limit says, and a streaming
request is refused inside an answer that has begun. Here a request is counted before anything of it
is read or checked, and each one beyond the limit gets 503 at once. vLLM's own 503 get the
`Retry-After` header too.
"""

from __future__ import annotations

import argparse
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.server.asgi import refuse, route_path
from sluice.server.endpoints import Kind, kind_of

RETRY_AFTER_SECONDS = 1
_UNAVAILABLE = 503


class OverloadMiddleware:
    """Refuses requests beyond a limit, and adds `Retry-After` to each 503 that answers a POST.

    Requests that ask the engine for work are counted. Each API server process has a count of its
    own. Health checks are GETs and get no header, since nobody knows when a dead engine is back.
    """

    def __init__(self, app: ASGIApp, limit: int | None, retry_after: int) -> None:
        self._app = app
        self._limit = limit
        self._retry_after = str(retry_after)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; everything but a POST passes untouched."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return

        async def send_with_retry(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == _UNAVAILABLE:
                MutableHeaders(scope=message).setdefault("retry-after", self._retry_after)
            await send(message)

        generates = kind_of(scope["method"], route_path(scope)) is Kind.GENERATING
        if self._limit is None or not generates:
            await self._app(scope, receive, send_with_retry)
            return
        if self._open >= self._limit:
            answer = JSONResponse(_refusal(self._limit), _UNAVAILABLE)
            await refuse(answer, receive, send_with_retry)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send_with_retry)
        finally:
            self._open -= 1


def _refusal(limit: int) -> dict[str, Any]:
    """OpenAI-shaped error object."""
    return {
        "error": {
            "message": f"the server takes {limit} requests at once: try again later",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": _UNAVAILABLE,
        }
    }


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `sluice serve`."""
    group.add_argument(
        "--max-open-requests",
        type=at_least_one,
        metavar="N",
        help="most open requests of an API server process; others get 503 with Retry-After "
        "(default: no limit)",
    )
    group.add_argument(
        "--retry-after",
        type=at_least_one,
        default=RETRY_AFTER_SECONDS,
        metavar="SECONDS",
        help="how long a 503 tells the client to wait (default: %(default)s)",
    )


def at_least_one(text: str) -> int:
    """Read a flag's positive integer.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
