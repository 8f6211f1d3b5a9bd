"""Middleware that finds out who sent a request, before anything of it is read.

With `--keys` every path needs a key but those of `sluice.server.endpoints.OPEN`, and paths that
manage the server need one of capability `admin`.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sluice.server.access.capability import Caller, Capability, ForbiddenError
from sluice.server.access.keys import Keys
from sluice.server.asgi import refuse, route_path
from sluice.server.endpoints import METRICS, Kind, kind_of

_CALLER = "sluice_caller"
_UNRESTRICTED = Caller(None, Capability.ADMIN)
_ANONYMOUS = Caller(None, Capability.BASIC)


class CallerMiddleware:
    """Puts a `Caller` into the scope's state; answers 401 where a key is needed and none fits.

    Without keys all callers are the same and have every capability.

    Args:
        app: behind it.
        keys: of the keys file, or None.
        open_metrics: whether `/metrics` needs no key.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, *, open_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._open_metrics = open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; the server's start and end pass untouched."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        kind = kind_of(scope.get("method", ""), path)
        caller = self._caller(scope, kind, path)
        if caller is None:
            headers = {"WWW-Authenticate": "Bearer"}
            answer = JSONResponse(unauthorized_body(), 401, headers)
        elif kind is Kind.MANAGING and not caller.capability.covers(Capability.ADMIN):
            answer = JSONResponse(_managing(path).body(), 403)
        else:
            scope.setdefault("state", {})[_CALLER] = caller
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            await refuse(answer, receive, send)
        else:
            await answer(scope, receive, send)

    def _caller(self, scope: Scope, kind: Kind, path: str) -> Caller | None:
        if self._keys is None:
            return _UNRESTRICTED
        if kind is Kind.OPEN or (path == METRICS and self._open_metrics):
            return _ANONYMOUS
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return self._keys.caller(key) if scheme.lower() == "bearer" else None


def _managing(path: str) -> ForbiddenError:
    return ForbiddenError(f"{path[:100]} needs a key of capability 'admin'", param="path")


def caller_of(scope: Scope) -> Caller:
    """Who sent the request.

    Raises:
        KeyError: the request has not passed `CallerMiddleware`, and must not be served.
    """
    caller: Caller = scope["state"][_CALLER]
    return caller


def unauthorized_body() -> dict[str, Any]:
    """OpenAI-shaped error object for a request without a known key."""
    return {
        "error": {
            "message": "this server needs a key that it knows: Authorization: Bearer KEY",
            "type": "AuthenticationError",
            "param": None,
            "code": 401,
        }
    }
