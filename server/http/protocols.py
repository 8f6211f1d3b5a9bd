"""How each API that takes routing shapes its errors, its streams and its answers.

`/v1/chat/completions` and `/v1/completions` are OpenAI's older APIs, `/v1/responses` is the newer
one, `/v1/messages` is Anthropic's. The report goes where each has room for it: into the answer
itself, and in a stream into the event that brings the usage.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from sluice.models.routing.errors import RoutingError
from sluice.server.http.sse import Event

Failure = Literal["rejected", "error"]


class Api(ABC):
    """One API."""

    def error(self, error: RoutingError) -> dict[str, Any]:
        """The body of a refusal."""
        return error.body()

    @abstractmethod
    def closes(self, event: Event) -> bool:
        """Whether the report belongs into this event of a stream."""

    def report_place(self, data: dict[str, Any]) -> dict[str, Any]:
        """The object of an event that gets the report."""
        return data

    @abstractmethod
    def failure(self, event: Event) -> Failure | None:
        """How the request failed, if this event of a stream says so."""

    @abstractmethod
    def renamed(self, event: Event, names: tuple[str, str]) -> Event:
        """The event with the client's name of the model, (vLLM's, the client's)."""


class CompletionsApi(Api):
    """Chat and plain completions: chunks without an event name."""

    def closes(self, event: Event) -> bool:
        """The chunk with usage and no choices."""
        if b'"usage"' not in event.data or not event.data.startswith(b"{"):
            return False
        chunk = json.loads(event.data)
        return bool(chunk.get("usage")) and chunk.get("choices") == []

    def failure(self, event: Event) -> Failure | None:
        """A chunk that holds an error and nothing else."""
        if not event.data.startswith(b'{"error"'):
            return None
        code = json.loads(event.data)["error"].get("code")
        # A 503 says that the server is full: the request itself was in order.
        rejected = isinstance(code, int) and (400 <= code < 500 or code == 503)
        return "rejected" if rejected else "error"

    def renamed(self, event: Event, names: tuple[str, str]) -> Event:
        """Every chunk names the model, before any text of the model's or the client's.

        So the first match is the name, and a chunk need not be parsed.
        """
        ours, theirs = (
            b'"model":' + json.dumps(name, ensure_ascii=False).encode() for name in names
        )
        return Event(event.head, event.data.replace(ours, theirs, 1))


class ResponsesApi(Api):
    """OpenAI's Responses: events that hold the whole response at the start and at the end."""

    _WHOLE = frozenset({b"response.created", b"response.in_progress", b"response.completed"})

    def closes(self, event: Event) -> bool:
        """The event with the finished response."""
        return event.name == b"response.completed"

    def report_place(self, data: dict[str, Any]) -> dict[str, Any]:
        """The response in the event."""
        response: dict[str, Any] = data["response"]
        return response

    def failure(self, event: Event) -> Failure | None:
        """An error, or a response that failed."""
        return "error" if event.name in (b"error", b"response.failed") else None

    def renamed(self, event: Event, names: tuple[str, str]) -> Event:
        """The response in the event names the model."""
        return _renamed_in(event, "response", names) if event.name in self._WHOLE else event


class MessagesApi(Api):
    """Anthropic's Messages."""

    def error(self, error: RoutingError) -> dict[str, Any]:
        """Anthropic's shape, which has no place for the field: the message begins with it."""
        message = error.message
        if not message.startswith(error.param):
            message = f"{error.param}: {message}"
        kind = "permission_error" if error.status == 403 else "invalid_request_error"
        return {"type": "error", "error": {"type": kind, "message": message}}

    def closes(self, event: Event) -> bool:
        """The event with the last usage."""
        return event.name == b"message_delta"

    def failure(self, event: Event) -> Failure | None:
        """An error event."""
        return "error" if event.name == b"error" else None

    def renamed(self, event: Event, names: tuple[str, str]) -> Event:
        """The first event holds a message, which names the model."""
        return _renamed_in(event, "message", names) if event.name == b"message_start" else event


def _renamed_in(event: Event, key: str, names: tuple[str, str]) -> Event:
    data = json.loads(event.data)
    if data[key].get("model") == names[0]:
        data[key]["model"] = names[1]
    return event.with_data(data)


_COMPLETIONS = CompletionsApi()
APIS: Mapping[str, Api] = {"/v1/responses": ResponsesApi(), "/v1/messages": MessagesApi()}


def api_of(path: str) -> Api:
    """The API of a path; what is in none has OpenAI's shapes."""
    return APIS.get(path, _COMPLETIONS)
