"""Middleware around vLLM's routes: admits routing on the way in, adds the report on the way out.

It is the innermost one, behind the limits, vLLM's authentication and ours: what they refuse does
not come this far. Only bodies of paths that turn text into tokens or tokens into text are read.
"""

from __future__ import annotations

import json
import re

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import CUSTOM_PRESET, NO_PRESET
from sluice.server.access.authentication import caller_of
from sluice.server.access.capability import Caller, ForbiddenError
from sluice.server.admission import Admitted
from sluice.server.asgi import is_json_post, read_body, replay_body, route_path
from sluice.server.endpoints import ROUTED, Kind, kind_of
from sluice.server.http.answer import Answer
from sluice.server.http.protocols import api_of
from sluice.server.http.state import Edge
from sluice.server.telemetry.audit import log_expert_routing, log_refused
from sluice.server.telemetry.spans import policy_attributes, ran_attributes

_READ = (Kind.GENERATING, Kind.TEXT)
_MOST_CONTAINERS = 50_000
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class RoutingMiddleware:
    """Turns `routing` into extra args for the engine, and the engine's record into a report."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; what cannot hold routing passes untouched."""
        edge: Edge | None = getattr(scope["app"].state, "sluice", None) if "app" in scope else None
        if edge is None or not is_json_post(scope):
            await self._app(scope, receive, send)
            return
        path, caller = route_path(scope), caller_of(scope)
        # A path with a slash at its end is answered by a redirect.
        if kind_of(scope["method"], path) not in _READ or path.endswith("/"):
            await self._app(scope, receive, send)
            return
        raw = await read_body(receive)
        if raw is None:
            return
        try:
            admitted = _admitted(edge, path, raw, caller)
        except RoutingError as error:
            if isinstance(error, ForbiddenError):
                log_refused(caller, error)
            edge.metrics.rejected(error.reason)
            if path in ROUTED:
                edge.metrics.finished(error.preset or CUSTOM_PRESET, "rejected")
            refusal = JSONResponse(api_of(path).error(error), error.status)
            await refusal(scope, receive, send)
            return
        if path not in ROUTED:
            await self._app(scope, replay_body(raw, receive), send)
            return
        if admitted is not None:
            if admitted.effort is not None:
                edge.metrics.asked(admitted.effort)
            # Escaped, since a lone surrogate is for vLLM to refuse.
            raw = json.dumps(admitted.body).encode()
            headers = MutableHeaders(scope=scope)
            headers["content-length"] = str(len(raw))
            if edge.spans is not None:
                edge.spans.open(admitted.extra.request_key, policy_attributes(admitted))
        answer = Answer(edge, api_of(path), admitted, send)
        try:
            await self._app(scope, replay_body(raw, receive), answer.send)
        finally:
            await _finish(edge, admitted, caller, answer)


async def _finish(edge: Edge, admitted: Admitted | None, caller: Caller, answer: Answer) -> None:
    """Count, log and trace a request that has ended, whatever its outcome."""
    edge.metrics.finished(admitted.preset if admitted else NO_PRESET, answer.outcome)
    try:
        await answer.count()
    finally:
        if admitted is not None:
            log_expert_routing(caller, admitted, answer.outcome, answer.status, answer.record)
            if edge.spans is not None:
                edge.spans.close(
                    admitted.extra.request_key, ran_attributes(admitted, answer.record)
                )


def _admitted(edge: Edge, path: str, raw: bytes, caller: Caller) -> Admitted | None:
    """The request, or None if it has no routing. What was parsed is not kept for its lifetime.

    Raises:
        RoutingError: the routing is refused, or the body cannot be looked into.
    """
    _check_size(raw)
    try:
        body = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None  # vLLM's route says what is wrong with a body that is not JSON.
    except RecursionError:
        raise _unreadable("is nested too deeply") from None
    except ValueError:
        raise _unreadable("has a number of too many digits") from None
    return edge.admission.admit(path, body, caller) if isinstance(body, dict) else None


def _check_size(raw: bytes) -> None:
    """Bound the objects and lists of a body: four megabytes of empty ones take 300 MB, and seconds.

    Brackets in texts do not count; they are looked for only where there are very many.
    """
    if _containers(raw) > _MOST_CONTAINERS < _containers(_STRING.sub(b"", raw)):
        raise _unreadable(f"has more than {_MOST_CONTAINERS} objects and lists")


def _containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")


def _unreadable(what: str) -> RoutingError:
    return RoutingError(f"the body {what}", param="body", reason="invalid_field")
