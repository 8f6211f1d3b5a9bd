"""How long the tokens of a batch took, by what a server streams and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from sluice.loadtest.comparison.decode import AnswerError, BatchTimes, timed_batch
from sluice.loadtest.comparison.pairs import Comparison, Pairs


def event(content: str | None = None, usage: int | None = None) -> str:
    choices = [] if content is None else [{"delta": {"content": content}}]
    chunk: dict[str, Any] = {"choices": choices}
    if usage is not None:
        chunk["usage"] = {"completion_tokens": usage}
    return f"data: {json.dumps(chunk)}\n\n"


def streaming(waits: Callable[[str], tuple[float, float]], tokens: int = 3) -> Any:
    """A server that waits, sends a token, waits, and sends the others; by prompt."""

    async def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        before, between = waits(body["messages"][0]["content"])

        async def stream() -> AsyncIterator[bytes]:
            await asyncio.sleep(before)
            yield event("").encode()
            await asyncio.sleep(between)
            yield (event("a") + event("b") + event(usage=tokens) + "data: [DONE]\n\n").encode()

        return httpx.Response(200, content=stream())

    return httpx.MockTransport(handle)


def timed(transport: Any, prompts: list[str], **more: Any) -> BatchTimes:
    async def run() -> BatchTimes:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            routings = more.get("routings", [None] * len(prompts))
            return await timed_batch(client, "m", prompts, routings, 3, more.get("first", 0))

    return asyncio.run(run())


def test_decoding_begins_when_every_request_has_its_first_token() -> None:
    waits = {"early": (0.0, 0.5), "late": (0.2, 0.4)}
    times = timed(streaming(waits.__getitem__), ["early", "late"])
    assert times.decode == pytest.approx(0.4, abs=0.1)
    assert times.total == pytest.approx(0.6, abs=0.1)


def test_times_are_of_the_requests_that_count() -> None:
    waits = {"routed": (0.5, 0.9), "one": (0.0, 0.5), "other": (0.2, 0.2)}
    times = timed(streaming(waits.__getitem__), ["routed", "one", "other"], first=1)
    assert times.decode == pytest.approx(0.3, abs=0.1)
    assert times.total == pytest.approx(0.5, abs=0.1)


def test_other_answers_are_no_measurement() -> None:
    with pytest.raises(AnswerError, match="2 tokens came, not 3"):
        timed(streaming(lambda _: (0.0, 0.0), tokens=2), ["a"])
    refusal = httpx.MockTransport(lambda _: httpx.Response(400, text="routing.effort: no"))
    with pytest.raises(AnswerError, match=r"routing\.effort: no"):
        timed(refusal, ["a"])
    broken = httpx.MockTransport(lambda _: httpx.Response(200, text='data: {"error": "died"}\n\n'))
    with pytest.raises(AnswerError, match="died"):
        timed(broken, ["a"])


def test_a_request_has_the_routing_and_no_early_end() -> None:
    seen: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, text=event("a") + event(usage=3))

    timed(httpx.MockTransport(handle), ["a"], routings=[{"effort": 0.5}])
    timed(httpx.MockTransport(handle), ["a"])
    assert seen[0]["routing"] == {"effort": 0.5}
    assert "routing" not in seen[1]
    assert all(body["ignore_eos"] and body["max_tokens"] == 3 for body in seen)


def test_ratios_are_of_pairs() -> None:
    stock = [BatchTimes(2.0 * n, 3.0 * n) for n in range(1, 7)]
    ours = [BatchTimes(1.0 * n, 2.0 * n) for n in range(1, 7)]
    wire = Pairs("p", 8, stock, ours).to_wire()
    assert wire["decode_ratio"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert wire["total_ratio"]["value"] == 1.5
    assert wire["stock_seconds"][1] == [4.0, 6.0]


def test_servers_take_turns_with_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[str, ...], Any]] = []

    async def record(client: Any, _model: str, prompts: Any, routings: Any, *_: Any) -> Any:
        seen.append((client.base_url.host, tuple(prompts), routings))
        return BatchTimes(1.0, 1.0)

    monkeypatch.setattr("sluice.loadtest.comparison.pairs.timed_batch", record)
    asked = Comparison("m", ["a", "b", "c"], {"none": None, "half": {"effort": 0.5}}, [2], 6, 3)
    rows = asked.run("http://stock", "http://ours", lambda _: None)
    assert [len(row.stock) for row in rows] == [6, 6]
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert {one[0], other[0]} == {"stock", "ours"}
        assert one[1] == other[1]
    first = [seen[place][0] for place in range(0, len(seen), 4)]
    assert first[:4] == ["ours", "stock", "ours", "stock"] or first[:4] == [
        *("stock", "ours", "stock", "ours")
    ]
    assert all(routings == [None] * 2 for host, _, routings in seen if host == "stock")
    asked_of_us = [routings for host, _, routings in seen if host == "ours"]
    assert asked_of_us[:2] == [[None] * 2, [{"effort": 0.5}] * 2]


def test_neighbours_of_routed_requests_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any, int]] = []

    async def record(
        client: Any, _model: str, _prompts: Any, routings: Any, _tokens: int, first: int
    ) -> Any:
        seen.append((client.base_url.host, routings, first))
        return BatchTimes(1.0, 1.0)

    monkeypatch.setattr("sluice.loadtest.comparison.pairs.timed_batch", record)
    policy = {"effort": 0.5}
    asked = Comparison("m", ["a", "b"], {"half": policy}, [3], 6, 3, routed=1)
    asked.run("http://stock", "http://ours", lambda _: None)
    assert all(first == 1 for _, _, first in seen)
    routings = {host: routings for host, routings, _ in seen}
    assert routings == {"stock": [None] * 3, "ours": [policy, None, None]}
