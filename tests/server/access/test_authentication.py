"""Who gets past the door, and as whom."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sluice.server.access.authentication import CallerMiddleware, caller_of
from sluice.server.access.capability import Caller, Capability
from sluice.server.access.keys import Keys, digest_of

ALICE = Caller("alice", Capability.DEPTH)
KEYS = Keys(((digest_of("a-key"), ALICE),))
ANONYMOUS = Caller(None, Capability.BASIC)
CHAT = "/v1/chat/completions"


def knock(
    keys: Keys | None,
    path: str = CHAT,
    key: str | None = None,
    *,
    open_metrics: bool = False,
    **scope: Any,
) -> Any:
    """The caller that the app sees, or the answer without one."""
    headers = [] if key is None else [(b"authorization", key.encode("latin-1"))]
    seen: list[Caller] = []
    sent: list[Any] = []

    async def app(inner: Any, receive: Any, send: Any) -> None:
        seen.append(caller_of(inner))

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(
        CallerMiddleware(app, keys, open_metrics=open_metrics)(
            {"type": "http", "method": "POST", "path": path, "headers": headers, **scope},
            receive,
            send,
        )
    )
    return seen[0] if seen else sent


def status(answer: Any) -> int:
    return int(answer[0]["status"])


def test_the_key_tells_who_it_is() -> None:
    assert knock(KEYS, key="Bearer a-key") == ALICE
    assert knock(KEYS, key="bearer a-key") == ALICE


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer b-key",
        "Bearer a-key ",
        "Basic a-key",
        "a-key",
        "\xff",
    ],
)
def test_no_key_that_fits_is_401_in_openais_shape(key: str | None) -> None:
    start, body, _ = knock(KEYS, key=key)
    assert start["status"] == 401
    assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/invocations", "/tokenize", "/generative_scoring", "/metrics", "/nowhere", "/"],
)
def test_every_path_is_guarded(path: str) -> None:
    assert status(knock(KEYS, path)) == 401
    assert status(knock(KEYS, path, method="GET")) == 401
    assert knock(KEYS, path, key="Bearer a-key", method="GET") == ALICE
    assert knock(KEYS, path, method="OPTIONS") == ANONYMOUS


@pytest.mark.parametrize("path", ["/health", "/ping", "/console", "/console/console.js"])
def test_what_is_named_open_needs_no_key(path: str) -> None:
    assert knock(KEYS, path, method="GET") == ANONYMOUS
    if "." not in path:
        assert status(knock(KEYS, f"{path}x", method="GET")) == 401


def test_metrics_are_open_by_choice() -> None:
    assert knock(KEYS, "/metrics", method="GET", open_metrics=True) == ANONYMOUS
    assert status(knock(KEYS, "/metricsx", method="GET", open_metrics=True)) == 401


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/v1/load_lora_adapter", "/sleep", "/new"])
def test_managing_the_server_needs_an_admin(path: str) -> None:
    start, body, _ = knock(KEYS, path, key="Bearer a-key")
    assert start["status"] == 403
    assert json.loads(body["body"])["error"]["type"] == "PermissionDeniedError"
    admin = Caller("root", Capability.ADMIN)
    assert knock(Keys(((digest_of("b"), admin),)), path, key="Bearer b") == admin


@pytest.mark.parametrize(
    ("root", "path"),
    [("/api", f"/api{CHAT}"), ("/api", CHAT), ("/", CHAT), ("/v", CHAT), ("/api/", CHAT)],
)
def test_a_root_path_opens_no_way_round(root: str, path: str) -> None:
    assert status(knock(KEYS, path, root_path=root)) == 401


def test_websockets_need_the_key_too() -> None:
    answer = knock(KEYS, "/v1/realtime", type="websocket")
    assert answer[0]["type"].startswith("websocket.")
    assert status(answer) == 401


def test_without_keys_everybody_may_everything() -> None:
    assert knock(None) == Caller(None, Capability.ADMIN)
    assert knock(None, key="Bearer b-key") == Caller(None, Capability.ADMIN)


def test_a_request_that_nobody_asked_is_not_served() -> None:
    with pytest.raises(KeyError):
        caller_of({"type": "http", "state": {}})
