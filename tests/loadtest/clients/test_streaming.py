"""Every way in which a request of the hand-written client can end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise

import httpx
import pytest

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.clients.streaming import send, send_in_turn, send_when_due
from sluice.loadtest.workload.schedule import PlannedRequest

ASK = PlannedRequest("sort 2 1", "p", {"model": "m", "max_tokens": 9})
Answer = Callable[[httpx.Request], httpx.Response]


def event(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"


def stream(*lines: str) -> Answer:
    return lambda request: httpx.Response(200, text="".join(lines))


def fails(error: type[httpx.TransportError]) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error("no", request=request)

    return answer


def asked(answer: Answer, ask: PlannedRequest = ASK) -> RequestResult:
    async def one() -> RequestResult:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await send(client, ask)

    return asyncio.run(one())


ROLE = f"data: {json.dumps({'choices': [{'delta': {'role': 'assistant', 'content': ''}}]})}\n\n"
USAGE = f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 3}})}\n\n"
WHOLE = stream(ROLE, event("1"), event(" "), event("2"), USAGE, "data: [DONE]\n\n")


def test_a_whole_answer() -> None:
    found = asked(WHOLE)
    assert (found.ending, found.status, found.tokens) == ("answered", 200, 3)
    assert found.first is not None
    assert found.last is not None
    assert found.start <= found.first <= found.last <= found.end
    assert (found.policy, found.prompt) == ("p", "sort 2 1")


def test_what_is_sent() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return WHOLE(request)

    asked(answer)
    assert seen[0].url.path == "/v1/chat/completions"
    assert json.loads(seen[0].content) == {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "sort 2 1"}],
        "stream": True,
    }


@pytest.mark.parametrize(
    ("answer", "ending", "status", "retry", "detail"),
    [
        (
            lambda _: httpx.Response(503, headers={"Retry-After": "1"}, text="busy"),
            "refused",
            503,
            True,
            "busy",
        ),
        (lambda _: httpx.Response(503, text="busy"), "refused", 503, False, "busy"),
        (lambda _: httpx.Response(400, text="bad"), "refused", 400, False, "bad"),
        (lambda _: httpx.Response(500, text="oh"), "refused", 500, False, "oh"),
        (fails(httpx.ReadTimeout), "hung", None, False, "ReadTimeout"),
        (fails(httpx.ConnectTimeout), "hung", None, False, "ConnectTimeout"),
        (fails(httpx.ConnectError), "lost", None, False, "ConnectError"),
        (fails(httpx.RemoteProtocolError), "lost", None, False, "RemoteProtocolError"),
        (stream(event("1")), "lost", None, False, "without [DONE]"),
        (stream(event("1"), "data: {]\n\n"), "lost", None, False, "JSONDecodeError"),
        (
            stream(event("1"), 'data: {"error": {"message": "engine"}}\n\n', "data: [DONE]\n\n"),
            "lost",
            None,
            False,
            "engine",
        ),
    ],
)
def test_other_endings(
    answer: Answer, ending: str, status: int | None, retry: bool, detail: str
) -> None:
    found = asked(answer)
    assert (found.ending, found.status, found.retry_after) == (ending, status, retry)
    assert detail in found.detail


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_client_leaves_after_its_tokens(tokens: int) -> None:
    found = asked(WHOLE, PlannedRequest("q", "p", {}, leave_after=tokens))
    assert (found.ending, found.tokens) == ("aborted", tokens)


def test_a_short_answer_is_whole_before_the_client_would_leave() -> None:
    assert asked(WHOLE, PlannedRequest("q", "p", {}, leave_after=5)).ending == "answered"


def test_requests_at_their_time_do_not_wait_for_each_other() -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.2)
        return WHOLE(request)

    async def run() -> list[RequestResult]:
        transport = httpx.MockTransport(slow)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            requests = [PlannedRequest(str(i), "p", {}, due=i / 20) for i in range(4)]
            return await send_when_due(client, requests, time.time())

    found = asyncio.run(run())
    assert [each.prompt for each in found] == ["0", "1", "2", "3"]
    assert found[3].start < found[0].end
    for number, each in enumerate(found):
        assert each.due is not None
        assert each.due - found[0].due == pytest.approx(number / 20)  # type: ignore[operator]
        assert each.start >= each.due


def test_requests_in_turn_end_in_time() -> None:
    async def run() -> list[RequestResult]:
        transport = httpx.MockTransport(WHOLE)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            requests = (PlannedRequest(str(i), "p", {}) for i in range(10**9))
            return await send_in_turn(client, requests, time.time() + 0.2)

    found = asyncio.run(run())
    assert len(found) > 1
    assert all(before.end <= after.start for before, after in pairwise(found))
