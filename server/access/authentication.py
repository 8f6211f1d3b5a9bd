"""Middleware that finds out who sent a request.

It guards the paths that vLLM's `--api-key` would guard. It runs just before `RoutingMiddleware`,
which reads the caller.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sluice.server.access.capability import Caller, Capability
from sluice.server.access.keys import Keys
from sluice.server.asgi import route_path

_CALLER = "sluice_caller"
_UNRESTRICTED = Caller(None, Capability.ADMIN)
_ANONYMOUS = Caller(None, Capability.BASIC)


class CallerMiddleware:
    """Puts a `Caller` into the scope's state; answers 401 where a key is needed and none fits.

    Without keys all callers are the same and have every capability. With keys, callers of paths
    that need no key are anonymous and may only use presets.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

        self._app = app
        self._keys = keys
        self._guarded = GUARDED_PREFIX

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; the server's start and end pass untouched."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        caller = self._caller(scope)
        if caller is None:
            headers = {"WWW-Authenticate": "Bearer"}
            answer = JSONResponse(unauthorized_body(), 401, headers)
            await answer(scope, receive, send)
            return
        scope.setdefault("state", {})[_CALLER] = caller
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        if self._keys is None:
            return _UNRESTRICTED
        preflight = scope.get("method") == "OPTIONS"
        if preflight or not route_path(scope).startswith(self._guarded):
            return _ANONYMOUS
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return self._keys.caller(key) if scheme.lower() == "bearer" else None


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
