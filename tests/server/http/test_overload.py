"""Requests beyond the limit are refused at once, and told when to come back."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluice.server.http.overload import OverloadMiddleware, add_arguments

PATH = "/v1/completions"


def answering(status: int, headers: list[tuple[bytes, bytes]] | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": status, "headers": headers or []}
        await send(start)
        await send({"type": "http.response.body", "body": b"said"})

    return app


async def nothing() -> Message:
    """The body of a request that has none."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def answered(app: ASGIApp, method: str = "POST", path: str = PATH) -> list[Message]:
    """What comes out of an app."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": []}, nothing, send)
    return sent


def once(status: int, method: str = "POST", **more: Any) -> list[Message]:
    return asyncio.run(answered(OverloadMiddleware(answering(status, **more), 3, 7), method))


def test_a_refusal_for_load_says_when_to_come_back() -> None:
    start, body = once(503)
    assert start["headers"] == [(b"retry-after", b"7")]
    assert body == {"type": "http.response.body", "body": b"said"}


def test_what_the_app_said_stays() -> None:
    start, _ = once(503, headers=[(b"retry-after", b"30")])
    assert start["headers"] == [(b"retry-after", b"30")]


@pytest.mark.parametrize(
    ("status", "method"), [(200, "POST"), (400, "POST"), (500, "POST"), (503, "GET")]
)
def test_nothing_else_changes(status: int, method: str) -> None:
    start, _ = once(status, method)
    assert start["headers"] == []


def test_other_connections_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def silent(message: Message) -> None:
        raise AssertionError

    for kind in ("lifespan", "websocket"):
        asyncio.run(OverloadMiddleware(app, 1, 1)({"type": kind}, nothing, silent))
    assert seen == ["lifespan", "websocket"]


class Holding:
    """An app that answers once it is let, or fails."""

    def __init__(self, fails: bool = False) -> None:
        self.let = asyncio.Event()
        self.fails = fails
        self.entered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered += 1
        await self.let.wait()
        if self.fails:
            raise RuntimeError
        await answering(200)(scope, receive, send)


async def flood(limit: int | None, requests: int, **named: Any) -> list[int]:
    """Statuses of requests that come at once, and of one more after them."""
    app = Holding()
    around = OverloadMiddleware(app, limit, 7)
    tasks = [asyncio.create_task(answered(around, **named)) for _ in range(requests)]
    await asyncio.sleep(0)
    app.let.set()
    found = [await task for task in tasks]
    found.append(await answered(around, **named))
    return [messages[0]["status"] for messages in found]


def test_as_many_as_the_limit_pass_and_the_place_is_free_again() -> None:
    assert asyncio.run(flood(3, 5)) == [200, 200, 200, 503, 503, 200]
    assert asyncio.run(flood(None, 5)) == [200] * 6


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/ping")]
)
def test_what_asks_the_engine_for_nothing_is_not_counted(method: str, path: str) -> None:
    assert asyncio.run(flood(1, 3, method=method, path=path)) == [200] * 4


@pytest.mark.parametrize(
    "path", [PATH, "/v1/messages", "/inference/v1/generate", "/invocations", "/generative_scoring"]
)
def test_what_may_is_counted(path: str) -> None:
    assert asyncio.run(flood(1, 2, path=path)) == [200, 503, 200]


def test_a_request_that_fails_or_is_cancelled_gives_its_place_back() -> None:
    async def run() -> list[int]:
        app = Holding(fails=True)
        around = OverloadMiddleware(app, 2, 7)
        failing = asyncio.create_task(answered(around))
        leaving = asyncio.create_task(answered(around))
        await asyncio.sleep(0)
        refused = await answered(around)
        leaving.cancel()
        app.let.set()
        await asyncio.gather(failing, leaving, return_exceptions=True)
        app.fails = False
        return [(await each)[0]["status"] for each in (answered(around), answered(around))] + [
            refused[0]["status"],
            app.entered,
        ]

    assert asyncio.run(run()) == [200, 200, 503, 4]


def test_the_refusal_is_openai_shaped() -> None:
    async def run() -> list[Message]:
        app = Holding()
        around = OverloadMiddleware(app, 1, 7)
        first = asyncio.create_task(answered(around))
        await asyncio.sleep(0)
        refused = await answered(around)
        app.let.set()
        await first
        return refused

    start, body, _ = asyncio.run(run())
    assert dict(start["headers"])[b"retry-after"] == b"7"
    assert json.loads(body["body"]) == {
        "error": {
            "message": "the server takes 1 requests at once: try again later",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    }


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_argument_group("sluice"))
    return parser.parse_args(arguments)


def test_the_flags() -> None:
    assert vars(parsed()) == {"max_open_requests": None, "retry_after": 1}
    assert parsed("--retry-after", "30").retry_after == 30
    assert parsed("--max-open-requests", "8").max_open_requests == 8


@pytest.mark.parametrize("flag", ["--retry-after", "--max-open-requests"])
@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon"])
def test_a_wrong_flag(flag: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(flag, given)
    assert flag in capsys.readouterr().err
