"""Audit lines: what is in them, when they are written, and that nothing private is."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse

from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy, SkipSet
from sluice.models.routing.errors import RoutingError
from sluice.models.telemetry.request_record import ExpertUse, RoutingRecord
from sluice.server.access.authentication import CallerMiddleware
from sluice.server.access.capability import Caller, Capability, ForbiddenError
from sluice.server.access.keys import Keys, digest_of
from sluice.server.admission import Admitted
from sluice.server.http.middleware import RoutingMiddleware
from sluice.server.http.state import Edge
from sluice.server.telemetry import audit
from sluice.server.telemetry.metrics import RequestMetrics

POLICY = RoutingPolicy(experts=ExpertPolicy(masked=((3, 1),)))
ALICE = Caller("alice", Capability.EXPERTS)
SECRET = "the-words-of-the-prompt"
RECORD = RoutingRecord(
    counts=np.array([[[[7, 1, 2], [0, 0, 0]]], [[[3, 0, 0], [0, 0, 0]]]]),
    exits=np.array([3]),
    compute_fraction=1.0,
    generated_compute_fraction=1.0,
    experts=ExpertUse(3.5, 12, 1.0, neighbour_dependent=False),
)


def admitted(policy: RoutingPolicy = POLICY) -> Admitted:
    return Admitted({"messages": SECRET}, RoutingExtraArgs(policy, "r"), "custom", None)


class Lines(logging.Handler):
    """Keeps the audit lines."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.INFO
        self.texts.append(record.getMessage())

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    logger, handler = logging.getLogger(audit.LOGGER), Lines()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    audit.show_audit_log()
    assert logger.handlers == [handler], "a place that is there already is enough"
    yield handler
    logger.manager._clear_cache()  # type: ignore[attr-defined]


def test_what_a_served_request_leaves_behind(lines: Lines) -> None:
    audit.log_expert_routing(ALICE, admitted(), "ok", 200, RECORD)
    assert lines.events == [
        {
            "event": "expert_routing",
            "key": "alice",
            "preset": "custom",
            "policy": POLICY.digest,
            "outcome": "ok",
            "status": 200,
            "prompt_tokens": 10,
            "generated_tokens": 3,
            "masked": 12,
        }
    ]


def test_what_never_ran_has_no_counts(lines: Lines) -> None:
    audit.log_expert_routing(Caller(None, Capability.ADMIN), admitted(), "rejected", 400, None)
    (event,) = lines.events
    assert event["key"] is None
    assert event["prompt_tokens"] is event["generated_tokens"] is event["masked"] is None


def test_policies_without_expert_controls_are_not_logged(lines: Lines) -> None:
    audit.log_expert_routing(ALICE, admitted(RoutingPolicy()), "ok", 200, RECORD)
    skips = RoutingPolicy(skip=SkipSet.of(blocks=(1,)))
    audit.log_expert_routing(ALICE, admitted(skips), "ok", 200, RECORD)
    assert lines.events == []


def test_without_a_logging_setup_lines_go_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.Logger(audit.LOGGER)
    monkeypatch.setattr(audit, "_logger", logger)
    audit.show_audit_log()
    audit.show_audit_log()
    audit.log_refused(ALICE, ForbiddenError("no", param="routing.experts"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "[sluice.audit]" in line
    assert json.loads(line[line.index("{") :]) == {
        "event": "refused",
        "key": "alice",
        "param": "routing.experts",
        "reason": "forbidden",
    }


class FakeAdmission:
    """Says what it is told to say."""

    def __init__(self, answer: Admitted | RoutingError | None) -> None:
        self._answer = answer

    def admit(self, path: str, body: dict[str, Any], caller: Caller) -> Admitted | None:
        assert caller == ALICE
        if isinstance(self._answer, RoutingError):
            raise self._answer
        return self._answer


class FakeRecords:
    """Has a record of everything, or of nothing."""

    def __init__(self, record: RoutingRecord | None) -> None:
        self._record = record

    async def take(self, request_key: str) -> RoutingRecord | None:
        return self._record


def sent(
    answer: Admitted | RoutingError | None,
    *,
    fails: bool = False,
    record: RoutingRecord | None = RECORD,
) -> None:
    """One request through both middlewares to a route that answers, or breaks off."""
    registry = CollectorRegistry()
    edge = Edge(FakeAdmission(answer), RequestMetrics([], registry), FakeRecords(record))  # type: ignore[arg-type]

    async def route(scope: Any, receive: Any, send: Any) -> None:
        if fails:
            raise ConnectionError
        await JSONResponse({"answer": SECRET})(scope, receive, send)

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({"prompt": SECRET}).encode()}

    async def send(message: Any) -> None:
        pass

    keys = Keys(((digest_of("a-key"), ALICE),))
    app = CallerMiddleware(RoutingMiddleware(route), keys, open_metrics=False)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"authorization", b"Bearer a-key")],
        "app": SimpleNamespace(state=SimpleNamespace(sluice=edge)),
    }
    asyncio.run(app(scope, receive, send))


def test_a_served_request_is_logged_once(lines: Lines) -> None:
    sent(admitted())
    (event,) = lines.events
    assert (event["key"], event["outcome"], event["status"]) == ("alice", "ok", 200)
    assert (event["prompt_tokens"], event["generated_tokens"]) == (10, 3)
    assert SECRET not in "".join(lines.texts)
    assert "a-key" not in "".join(lines.texts)


def test_a_request_that_breaks_off_is_logged_too(lines: Lines) -> None:
    with pytest.raises(ConnectionError):
        sent(admitted(), fails=True)
    (event,) = lines.events
    assert (event["outcome"], event["status"]) == ("aborted", 0)


def test_an_engine_that_dies_does_not_take_the_line_along(lines: Lines) -> None:
    sent(admitted(), record=None)
    (event,) = lines.events
    assert (event["outcome"], event["prompt_tokens"]) == ("ok", None)


def test_only_what_is_forbidden_is_logged_as_refused(lines: Lines) -> None:
    sent(ForbiddenError("no", param="routing.experts"))
    sent(RoutingError("no", param="routing.experts", reason="invalid_field"))
    sent(None)
    assert [event["event"] for event in lines.events] == ["refused"]
