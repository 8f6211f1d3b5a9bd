"""Middleware that bounds the body of every request, on every path.

It counts while the body comes in, so that a client who names no length, or a wrong one, is stopped
as well. A request whose length is known to be too large is refused before any of it is read.
"""

from __future__ import annotations

import argparse
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.server.asgi import refuse
from sluice.server.http.overload import at_least_one

MAX_BODY_BYTES = 4 * 1024**2
"""A prompt of half a million tokens, as text or as token ids."""

_TOO_LARGE = 413


class BodyLimitMiddleware:
    """Answers 413 to a request whose body is over `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; everything but HTTP passes untouched."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = JSONResponse(_refusal(self._limit), _TOO_LARGE)
        # A length that is no number never gets here: the server has answered it.
        if int(Headers(scope=scope).get("content-length", "0")) > self._limit:
            await refuse(refusal, receive, send)
            return
        left = self._limit
        started = False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _BodyTooLargeError(self._limit)
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _BodyTooLargeError:
            if started:
                raise
            await refuse(refusal, receive, send)


class _BodyTooLargeError(HTTPException):
    """More of a body has come than is taken.

    A route that reads the body itself turns any other exception into a 400.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(_TOO_LARGE, _message(limit))


def _message(limit: int) -> str:
    return f"the body is over {limit} bytes (the server's --max-body-bytes)"


def _refusal(limit: int) -> dict[str, Any]:
    """OpenAI-shaped error object."""
    return {
        "error": {
            "message": _message(limit),
            "type": "RequestEntityTooLargeError",
            "param": "body",
            "code": _TOO_LARGE,
        }
    }


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag of `sluice serve`."""
    group.add_argument(
        "--max-body-bytes",
        type=at_least_one,
        default=MAX_BODY_BYTES,
        metavar="N",
        help="largest body of a request; a larger one gets 413 (default: %(default)s)",
    )
