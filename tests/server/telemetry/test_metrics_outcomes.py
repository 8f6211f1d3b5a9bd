"""How an answer is counted, by what the client was sent."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse

from sluice.models.routing.errors import RoutingError
from sluice.server.access.authentication import CallerMiddleware
from sluice.server.http.middleware import RoutingMiddleware
from sluice.server.http.state import Edge
from sluice.server.telemetry.metrics import RequestMetrics


class Refuses:
    """An admission that refuses everything, or lets it pass as it came."""

    def __init__(self, error: RoutingError | None) -> None:
        self._error = error

    def admit(self, path: str, body: Any, caller: Any) -> None:
        if self._error is not None:
            raise self._error


def counted(
    route: Any, error: RoutingError | None = None, path: str = "/v1/completions"
) -> dict[tuple[str, str], float]:
    """Requests by preset and outcome after one that `route` answers."""
    registry = CollectorRegistry()
    edge = Edge(Refuses(error), RequestMetrics(["fast"], registry), None)  # type: ignore[arg-type]

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({"prompt": "p"}).encode()}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "app": SimpleNamespace(state=SimpleNamespace(sluice=edge)),
    }
    asyncio.run(
        CallerMiddleware(RoutingMiddleware(route), keys=None, open_metrics=False)(
            scope, receive, send
        )
    )
    return {
        (sample.labels["preset"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "sluice_requests_total" and sample.value
    }


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (400, "rejected"), (429, "rejected"), (503, "rejected"), (500, "error")],
)
def test_an_answer_counts_by_its_status(status: int, outcome: str) -> None:
    assert counted(JSONResponse({}, status)) == {("none", outcome): 1}


def test_an_answer_that_breaks_off_was_aborted() -> None:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    assert counted(route) == {("none", "aborted"): 1}


def test_an_answer_that_nobody_waited_for_was_aborted() -> None:
    """vLLM answers `null` where the client left before there was an answer."""
    assert counted(JSONResponse(None)) == {("none", "aborted"): 1}


def streaming(*chunks: bytes) -> Any:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return route


def failed(code: object) -> bytes:
    error = {"message": '"choices"', "type": "x", "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


TEXT = b'data: {"id":"1","choices":[{"text":"{\\"error\\": 1}"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("chunks", "path", "outcome"),
    [
        ((TEXT, DONE), "/v1/completions", "ok"),
        ((TEXT, failed(400), DONE), "/v1/completions", "rejected"),
        ((TEXT, failed(503), DONE), "/v1/completions", "rejected"),
        ((TEXT, failed(500), DONE), "/v1/chat/completions", "error"),
        ((TEXT, failed("x"), DONE), "/v1/chat/completions", "error"),
        ((TEXT + failed(500)[:9], failed(500)[9:], DONE), "/v1/chat/completions", "error"),
        ((b'event: error\ndata: {"type":"error"}\n\n',), "/v1/messages", "error"),
        ((b'event: response.failed\ndata: {"type":"x"}\n\n',), "/v1/responses", "error"),
        ((b'event: message_stop\ndata: {"type":"message_stop"}\n\n',), "/v1/messages", "ok"),
        ((b"event: error\ndata: {}\n\n",), "/v1/completions", "ok"),
    ],
)
def test_a_stream_counts_by_its_events(chunks: tuple[bytes, ...], path: str, outcome: str) -> None:
    assert counted(streaming(*chunks), path=path) == {("none", outcome): 1}


@pytest.mark.parametrize("preset", ["fast", None])
def test_a_refused_policy_counts_under_its_preset(preset: str | None) -> None:
    error = RoutingError("no", param="routing", reason="invalid_field")
    error.preset = preset
    assert counted(JSONResponse({}), error) == {(preset or "custom", "rejected"): 1}
