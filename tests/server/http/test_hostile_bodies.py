"""Bodies made to cost: what they cost, and that the server goes on."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy abc"}], "max_tokens": 2}
MIB = 1024**2


def peak_memory(server: Server) -> int:
    """The most memory that the API server has held, in bytes."""
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def bomb(most: int = 2500) -> dict[str, Any]:
    return {"k" * 200_000: {str(number): 0 for number in range(most)}}


@pytest.mark.parametrize("path", ["/nowhere", "/v1/chat/completions", "/tokenize", "/invocations"])
def test_a_long_key_over_many_children_takes_no_memory(server: Server, path: str) -> None:
    """It took half a gigabyte, since a dotted path was made for every child."""
    server.post(path, json.dumps(CHAT).encode())
    before = peak_memory(server)
    status, answer = server.post(path, json.dumps({**CHAT, **bomb()}).encode())
    assert status in (200, 400, 404)
    assert peak_memory(server) - before < 32 * MIB
    assert len(answer) < 10_000


@pytest.mark.parametrize(
    "routing",
    [
        {"experts": {"bias": [{"layer": "x", "expert": "x", "value": "x"}] * 60_000}},
        {"k" * 1_000_000: 1},
        {"preset": "p" * 1_000_000},
        {"depth": {"exit": {"method": "m" * 1_000_000}}},
        {"depth": {"skip": {"blocks": ["x"] * 4000}}},
        {"experts": {"remix": {"method": "mode", "references": "r" * 1_000_000}}},
    ],
)
def test_a_refusal_is_short_whatever_it_refuses(server: Server, routing: Any) -> None:
    status, answer = server.post(
        "/v1/chat/completions", json.dumps({**CHAT, "routing": routing}).encode()
    )
    assert status == 400
    assert len(answer) < 3000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nowhere", "/tokenize"])
def test_a_body_over_the_limit_is_413(server: Server, path: str) -> None:
    raw = json.dumps({**CHAT, "junk": [0] * 3_000_000}).encode()
    status, answer = server.post(path, raw)
    assert status == 413
    assert b"--max-body-bytes" in answer


def test_a_body_without_a_length_is_counted(server: Server) -> None:
    """Chunked, and never ending: the answer comes when the limit is reached."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n"
            + f"authorization: Bearer {server.api_key}\r\n\r\n".encode()
        )
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(66):
            connection.sendall(chunk)
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"model": "demo", "routing": {"effort": ' + b"9" * 5000 + b"}}", "body"),
        (b'{"model": "demo", "routing": {"preset": "\\ud800"}}', "routing.preset"),
        (b'{"model": "demo", "routing": {"\\ud800": 1}}', "routing.\\ud800"),
        (b'{"model": "demo@\\ud800"}', "model"),
    ],
)
def test_what_no_text_can_hold_is_a_counted_400(server: Server, raw: bytes, field: str) -> None:
    def refusals() -> float:
        found = server.samples().items()
        return sum(
            value for series, value in found if series[0] == "sluice_policy_rejections_total"
        )

    before = refusals()
    status, answer = server.post("/v1/chat/completions", raw)
    assert (status, json.loads(answer)["error"]["param"]) == (400, field)
    assert refusals() == before + 1


def test_a_lone_surrogate_beside_routing_is_answered_as_without(server: Server) -> None:
    message = {"role": "user", "content": "a\ud800b"}
    plain = {**CHAT, "messages": [message]}
    routed = {**plain, "routing": {"depth": {"skip": {"mlp": [1]}}}}
    statuses = {
        server.post("/v1/chat/completions", json.dumps(body).encode())[0]
        for body in (plain, routed)
    }
    assert len(statuses) == 1


@pytest.mark.parametrize(
    "changes", [{"cache_salt": ""}, {"cache_salt": 3}, {"vllm_xargs": []}, {"stream_options": []}]
)
def test_a_wrong_field_of_vllms_is_answered_as_without_routing(
    server: Server, changes: dict[str, Any]
) -> None:
    answers = []
    for routing in ({}, {"routing": {"depth": {"skip": {"mlp": [1]}}, "report": True}}):
        body = {**CHAT, "stream": True, **changes, **routing}
        answers.append(server.post("/v1/chat/completions", json.dumps(body).encode()))
    (stock, said), (status, answer) = answers
    assert status == stock == 400
    assert json.loads(said)["error"]["param"] == json.loads(answer)["error"]["param"]


def test_a_slash_at_the_end_redirects_as_stock_does(server: Server) -> None:
    class Stays(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    opener = urllib.request.build_opener(Stays)
    body = json.dumps({**CHAT, "routing": {"report": True}}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.api_key}"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions/", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=60)
    assert caught.value.code == 307
    assert caught.value.headers["location"].endswith("/v1/chat/completions")


def test_the_server_goes_on(server: Server) -> None:
    status, answer = server.post("/v1/chat/completions", json.dumps(CHAT).encode())
    assert status == 200
    assert json.loads(answer)["choices"]
