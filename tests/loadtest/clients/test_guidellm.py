"""Every way in which a request that guidellm sends can end, against a server that does as told."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sluice.loadtest.clients.guidellm_runs import GuidellmError, Target, guidellm_pool
from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.workload.schedule import SteadyLoad

DEADLINE = 1.0
DONE = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


STREAMS = {
    "answer": event("1") + event(" 2") + DONE,
    "stop short": event("1"),
    "error": event("1") + b'data: {"error": {"message": "engine", "code": 500}}\n\n' + DONE,
    "hang": b"",
}


class Obedient(BaseHTTPRequestHandler):
    """Does what the prompt says."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        (part,) = body["messages"][0]["content"]
        told = part["text"]
        if told in ("503", "503 later", "400"):
            self.send_response(int(told[:3]))
            if told == "503 later":
                self.send_header("Retry-After", "1")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if told == "hang up":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(STREAMS[told])
        if told == "hang":
            time.sleep(3 * DEADLINE)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    Obedient.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Obedient)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def played(
    url: str, folder: Path, *loads: SteadyLoad, duration: float = 1.0
) -> list[list[RequestResult]]:
    async def run() -> list[list[RequestResult]]:
        target = Target(url, "m", "a-key", DEADLINE)
        async with guidellm_pool(folder) as guidellm:
            started: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            work = [guidellm.play(load, target, duration, started) for load in loads]
            found = [await each for each in work]
            assert started.result() <= min(each.start for part in found for each in part)
            return found

    return asyncio.run(run())


def test_every_ending(url: str, tmp_path: Path) -> None:
    told = (*STREAMS, "503", "503 later", "400", "hang up")
    due = tuple(number / 10 for number in range(len(told)))
    body = {"max_tokens": 3, "routing": {"preset": "p"}}
    again = ("answer",) * 3
    first, second = played(
        url,
        tmp_path,
        SteadyLoad("policy", body, told, due=due),
        SteadyLoad("other", {}, again, due=(0.0, 0.1, 0.2)),
    )
    found = {each.prompt: each for each in first}
    assert {name: (each.ending, each.status, each.retry_after) for name, each in found.items()} == {
        "answer": ("answered", 200, False),
        "stop short": ("lost", None, False),
        "error": ("lost", None, False),
        "hang": ("hung", None, False),
        "503": ("refused", 503, False),
        "503 later": ("refused", 503, True),
        "400": ("refused", 400, False),
        "hang up": ("lost", None, False),
    }
    answer = found["answer"]
    assert answer.tokens == 2
    assert answer.first is not None
    assert answer.last is not None
    assert answer.start <= answer.first <= answer.last <= answer.end
    assert "engine" in found["error"].detail
    assert found["hang"].latency >= DEADLINE
    times = sorted(each.due for each in first if each.due is not None)
    assert [each - times[0] for each in times] == pytest.approx(due, abs=1e-3)
    assert {each.policy for each in first} == {"policy"}
    bodies = {
        each["messages"][0]["content"][0]["text"]: each for each in Obedient.seen[: len(told)]
    }
    assert set(bodies) == set(told)
    for each in bodies.values():
        assert (each["model"], each["max_tokens"]) == ("m", 3)
        assert each["routing"] == {"preset": "p"}
        assert each["stream"] is True
    # One process has sent both loads.
    assert [(each.policy, each.ending) for each in second] == [("other", "answered")] * 3


def test_clients_that_ask_again_stop_in_time(url: str, tmp_path: Path) -> None:
    load = SteadyLoad("policy", {}, ("answer", "503") * 500, streams=2)
    first, second = played(url, tmp_path, load, SteadyLoad("other", {}, ("answer",) * 5, streams=2))
    assert {each.ending for each in first} == {"answered", "refused"}
    began = min(each.start for each in first)
    assert 2 < len(first) < 1000
    assert all(each.start - began < 1.5 for each in first)
    # As many at a time as there are clients; the data set is all that one asks.
    assert all(sum(a.start <= b.start < a.end for a in first) <= 2 for b in first)
    assert len(second) == 5


def test_a_guidellm_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(GuidellmError, match="guidellm ended"):
        played("http://127.0.0.1:9", tmp_path, SteadyLoad("policy", {}, (), due=()))
