"""Middleware around vLLM's routes: admits routing on the way in, adds the report on the way out.

It is the innermost one, behind vLLM's authentication and ours: where a key is needed, a request
without one does not come this far.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import CUSTOM_PRESET, NO_PRESET
from sluice.models.telemetry.report import build_report
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.server.access.authentication import caller_of
from sluice.server.access.capability import Caller, ForbiddenError
from sluice.server.admission import ROUTED_PATHS, Admitted
from sluice.server.asgi import is_json_post, read_body, replay_body, route_path
from sluice.server.http.sse import EventSplitter, is_usage_chunk, with_report
from sluice.server.http.state import Edge
from sluice.server.telemetry.audit import log_expert_routing, log_refused
from sluice.server.telemetry.spans import policy_attributes, ran_attributes

logger = logging.getLogger(__name__)


class RoutingMiddleware:
    """Turns `routing` into extra args for the engine, and the engine's record into a report."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but a JSON POST passes untouched."""
        edge: Edge | None = getattr(scope["app"].state, "sluice", None) if "app" in scope else None
        if edge is None or not is_json_post(scope):
            await self._app(scope, receive, send)
            return
        path, caller = route_path(scope), caller_of(scope)
        raw = await read_body(receive)
        if raw is None:
            return
        try:
            body = _parse(raw)
            admitted = edge.admission.admit(path, body, caller) if isinstance(body, dict) else None
        except (UnicodeDecodeError, json.JSONDecodeError):
            admitted = None  # vLLM's route says what is wrong with a body that is not JSON.
        except RoutingError as error:
            if isinstance(error, ForbiddenError):
                log_refused(caller, error)
            edge.metrics.rejected(error.reason)
            if path in ROUTED_PATHS:
                edge.metrics.finished(error.preset or CUSTOM_PRESET, "rejected")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        if path not in ROUTED_PATHS:
            await self._app(scope, replay_body(raw, receive), send)
            return
        if admitted is not None:
            if admitted.effort is not None:
                edge.metrics.asked(admitted.effort)
            raw = json.dumps(admitted.body, ensure_ascii=False).encode()
            headers = MutableHeaders(scope=scope)
            headers["content-length"] = str(len(raw))
            if edge.spans is not None:
                edge.spans.open(admitted.extra.request_key, policy_attributes(admitted))
        answer = _Answer(edge, admitted.extra if admitted else None, send)
        try:
            await self._app(scope, replay_body(raw, receive), answer.send)
        finally:
            await _finish(edge, admitted, caller, answer)


async def _finish(edge: Edge, admitted: Admitted | None, caller: Caller, answer: _Answer) -> None:
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


class _Answer:
    """Passes one answer on, adds the report to it, and counts what ran.

    Attributes:
        status: HTTP status that was sent, 0 until there is one.
        record: the engine's record of the request, None until it was taken.
    """

    def __init__(self, edge: Edge, extra: RoutingExtraArgs | None, send: Send) -> None:
        self._edge = edge
        self._extra = extra
        self._send = send
        self.status = 0
        self.record: RoutingRecord | None = None
        self._complete = False
        self._start: Message | None = None
        self._buffer = b""
        self._events: EventSplitter | None = None

    @property
    def outcome(self) -> Any:
        """`Outcome` of the request once the app has returned."""
        if not self.status or not self._complete:
            return "aborted"
        if self.status < 400:
            return "ok"
        # A 503 says that the server is full: the request itself was in order.
        return "rejected" if self.status < 500 or self.status == 503 else "error"

    async def send(self, message: Message) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._reports and not self._streams(message):
                self._start = message  # Held back: the length is known with the report.
                return
        elif message["type"] == "http.response.body":
            # vLLM sends `null` where the client left before there was an answer.
            abandoned = message.get("body") == b"null"
            self._complete = not message.get("more_body", False) and not abandoned
            if self._reports:
                await self._send_reported(message)
                return
        await self._send(message)

    @property
    def _reports(self) -> bool:
        return self._extra is not None and self._extra.policy.report and self.status == 200

    def _streams(self, start: Message) -> bool:
        content_type = Headers(raw=start["headers"]).get("content-type", "")
        if content_type.startswith("text/event-stream"):
            self._events = EventSplitter()
        return self._events is not None

    async def _send_reported(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._events is None:
            self._buffer += body
            if self._complete:
                await self._send_whole()
            return
        out = b"".join([await self._reported(event) for event in self._events.feed(body)])
        if self._complete:
            out += self._events.flush()
        await self._send({**message, "body": out})

    async def _send_whole(self) -> None:
        assert self._start is not None
        body = with_report(self._buffer, await self._report())
        headers = MutableHeaders(raw=self._start["headers"])
        headers["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _reported(self, event: bytes) -> bytes:
        return with_report(event, await self._report()) if is_usage_chunk(event) else event

    async def _report(self) -> dict[str, Any]:
        assert self._extra is not None
        await self._take()
        return build_report(self._extra.policy, self.record)

    async def _take(self) -> None:
        """Take the record from the engine, once.

        The answer is there by now, and goes out without a record if the engine has died.
        """
        assert self._extra is not None
        if self.record is None:
            try:
                self.record = await self._edge.take_record(self._extra.request_key)
            except Exception:
                logger.exception("no routing record for a request that ran")

    async def count(self) -> None:
        """Observe the share of full depth's compute that the request took, if it ran."""
        if self._extra is None:
            if self.outcome == "ok":
                self._edge.metrics.ran(1.0)
            return
        await self._take()
        if self.record is not None:
            self._edge.metrics.ran(self.record.compute_fraction)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except RecursionError:
        raise RoutingError(
            "the body is nested too deeply", param="body", reason="invalid_field"
        ) from None
