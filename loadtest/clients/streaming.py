"""Streaming clients that may leave before the end, which guidellm cannot do.

Times are taken as guidellm takes them: a token is a chunk with text in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.workload.schedule import PlannedRequest


class StreamBrokenError(Exception):
    """A stream ended without the end mark, or with an error in it."""


async def send_when_due(
    client: httpx.AsyncClient, requests: Sequence[PlannedRequest], started: float
) -> list[RequestResult]:
    """Send each request at its time, whatever became of the others.

    Args:
        client: with the server's base URL and its deadline as time-out.
        requests: with `due`.
        started: Unix seconds that `due` counts from.
    """

    async def one(request: PlannedRequest) -> RequestResult:
        due = started + (request.due or 0.0)
        await asyncio.sleep(max(0.0, due - time.time()))
        return await send(client, request, due)

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def send_in_turn(
    client: httpx.AsyncClient, requests: Iterator[PlannedRequest], until: float
) -> list[RequestResult]:
    """Send one request after the other until a moment in Unix seconds."""
    results: list[RequestResult] = []
    while time.time() < until:
        results.append(await send(client, next(requests)))
    return results


async def send(
    client: httpx.AsyncClient, request: PlannedRequest, due: float | None = None
) -> RequestResult:
    """Send one request and follow its stream to the end, or until the client leaves."""
    body = {
        **request.body,
        "messages": [{"role": "user", "content": request.prompt}],
        "stream": True,
    }
    start, tokens = time.time(), 0
    first: float | None = None
    last: float | None = None

    def result(ending: Any, **more: Any) -> RequestResult:
        return RequestResult(
            policy=request.policy,
            prompt=request.prompt,
            due=due,
            start=start,
            first=first,
            last=last,
            end=time.time(),
            tokens=tokens,
            ending=ending,
            **more,
        )

    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            status = response.status_code
            if status >= 400:
                detail = (await response.aread()).decode(errors="replace")[:200]
                retry = "retry-after" in response.headers
                return result("refused", status=status, retry_after=retry, detail=detail)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return result("answered", status=status)
                if not _has_text(data):
                    continue
                last = time.time()
                first = first or last
                tokens += 1
                if request.leave_after is not None and tokens >= request.leave_after:
                    return result("aborted", status=status)
            raise StreamBrokenError("the stream ended without [DONE]")
    except httpx.TimeoutException as error:
        return result("hung", detail=repr(error))
    except (httpx.HTTPError, StreamBrokenError, json.JSONDecodeError) as error:
        return result("lost", detail=repr(error))


def _has_text(data: str) -> bool:
    """Whether a chunk carries text.

    Raises:
        StreamBrokenError: it carries an error.
    """
    chunk = json.loads(data)
    if "error" in chunk:
        raise StreamBrokenError(data[:200])
    return any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices", ()))
