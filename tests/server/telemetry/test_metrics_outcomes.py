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


def counted(route: Any, error: RoutingError | None = None) -> dict[tuple[str, str], float]:
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
        "path": "/v1/completions",
        "headers": [],
        "app": SimpleNamespace(state=SimpleNamespace(sluice=edge)),
    }
    asyncio.run(CallerMiddleware(RoutingMiddleware(route), keys=None)(scope, receive, send))
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


@pytest.mark.parametrize("preset", ["fast", None])
def test_a_refused_policy_counts_under_its_preset(preset: str | None) -> None:
    error = RoutingError("no", param="routing", reason="invalid_field")
    error.preset = preset
    assert counted(JSONResponse({}), error) == {(preset or "custom", "rejected"): 1}
