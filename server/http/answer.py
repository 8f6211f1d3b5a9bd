"""One answer on its way out: the report, the client's name of the model, and how it ended."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from sluice.models.telemetry.report import build_report
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.server.admission import Admitted
from sluice.server.http.protocols import Api, Failure
from sluice.server.http.sse import Event, EventSplitter, encoded_json
from sluice.server.http.state import Edge
from sluice.server.telemetry.metrics import Outcome

POLICY_HEADER = "x-sluice-policy"
"""Response header with the digest of the policy that ran."""


class Answer:
    """Passes one answer on, adds to it what the client asked for, and counts what ran.

    Args:
        edge: of the app.
        api: of the path.
        admitted: the request, or None if it has no routing.
        send: of ASGI.

    Attributes:
        status: HTTP status that was sent, 0 until there is one.
        record: of the request, None until it was taken.
    """

    def __init__(self, edge: Edge, api: Api, admitted: Admitted | None, send: Send) -> None:
        self._edge = edge
        self._api = api
        self._admitted = admitted
        self._send = send
        self.status = 0
        self.record: RoutingRecord | None = None
        self._failure: Failure | None = None
        self._complete = False
        self._start: Message | None = None
        self._buffer = b""
        self._events: EventSplitter | None = None

    @property
    def outcome(self) -> Outcome:
        """How the request ended, once the app has returned."""
        if self._failure is not None:
            return self._failure
        if not self.status or not self._complete:
            return "aborted"
        if self.status < 400:
            return "ok"
        # A 503 says that the server is full: the request itself was in order.
        return "rejected" if self.status < 500 or self.status == 503 else "error"

    async def send(self, message: Message) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start":
            self._begin(message)
            if self._events is None and self._changes:
                self._start = message  # Held back: the length is known when the whole body is.
                return
        elif message["type"] == "http.response.body":
            # vLLM sends `null` where the client left before there was an answer.
            abandoned = message.get("body") == b"null"
            self._complete = not message.get("more_body", False) and not abandoned
            if self._events is not None:
                message = {**message, "body": await self._stream(message.get("body", b""))}
            elif self._start is not None:
                self._buffer += message.get("body", b"")
                if self._complete:
                    await self._send_whole(self._start)
                return
        await self._send(message)

    def _begin(self, start: Message) -> None:
        self.status = start["status"]
        headers = MutableHeaders(scope=start)
        if self._admitted is not None:
            headers[POLICY_HEADER] = self._admitted.extra.policy.digest
        if headers.get("content-type", "").startswith("text/event-stream"):
            self._events = EventSplitter()

    @property
    def _changes(self) -> bool:
        """Whether the answer's body is to be changed."""
        if self._admitted is None or self.status != 200:
            return False
        return self._admitted.extra.policy.report or self._admitted.model is not None

    async def _stream(self, chunk: bytes) -> bytes:
        """What to send for a chunk of a stream."""
        assert self._events is not None
        events = [*self._events.feed(chunk)]
        for event in events:
            self._failure = self._failure or self._api.failure(event)
        rest = self._events.flush() if self._complete else b""
        return b"".join([(await self._changed(event)).encode() for event in events]) + rest

    async def _changed(self, event: Event) -> Event:
        if self._admitted is None:
            return event
        if self._admitted.model is not None:
            event = self._api.renamed(event, self._admitted.model)
        if self._admitted.extra.policy.report and self._api.closes(event):
            data = json.loads(event.data)
            self._api.report_place(data)["routing"] = await self._report(self._admitted)
            event = event.with_data(data)
        return event

    async def _send_whole(self, start: Message) -> None:
        assert self._admitted is not None
        data: dict[str, Any] = json.loads(self._buffer)
        names = self._admitted.model
        if names is not None and data.get("model") == names[0]:
            data["model"] = names[1]
        if self._admitted.extra.policy.report:
            data["routing"] = await self._report(self._admitted)
        body = encoded_json(data)
        MutableHeaders(scope=start)["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _report(self, admitted: Admitted) -> dict[str, Any]:
        await self._take(admitted)
        return build_report(admitted.extra.policy, self.record)

    async def _take(self, admitted: Admitted) -> None:
        """Take the record, once; there is none if the engine has died."""
        if self.record is None:
            self.record = await self._edge.records.take(admitted.extra.request_key)

    async def count(self) -> None:
        """Observe the share of full depth's compute that the request took, if it ran."""
        if self._admitted is None:
            if self.outcome == "ok":
                self._edge.metrics.ran(1.0)
            return
        await self._take(self._admitted)
        if self.record is not None:
            self._edge.metrics.ran(self.record.compute_fraction)
