"""Streaming clients that may leave: what guidellm has no word for.

Times are taken as guidellm takes them: a token is a chunk with text in it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from sluice.loadtest.clients.request_result import Sent
from sluice.loadtest.workload.schedule import Ask


class StreamBrokenError(Exception):
    """A stream ended without the end mark, or with an error in it."""


async def ask_when_due(
    client: httpx.AsyncClient, asks: Sequence[Ask], started: float
) -> list[Sent]:
    """Send each request at its time, whatever became of the others.

    Args:
        client: with the server's base URL and its deadline as time-out.
        asks: with `due`.
        started: Unix seconds that `due` counts from.
    """

    async def one(ask: Ask) -> Sent:
        due = started + (ask.due or 0.0)
        await asyncio.sleep(max(0.0, due - time.time()))
        return await send(client, ask, due)

    return list(await asyncio.gather(*(one(ask) for ask in asks)))


async def ask_in_turn(client: httpx.AsyncClient, asks: Iterator[Ask], until: float) -> list[Sent]:
    """Send one request after the other until a moment in Unix seconds."""
    sent: list[Sent] = []
    while time.time() < until:
        sent.append(await send(client, next(asks)))
    return sent


async def send(client: httpx.AsyncClient, ask: Ask, due: float | None = None) -> Sent:
    """Send one request and follow its stream to the end, or until the client leaves."""
    body = {**ask.body, "messages": [{"role": "user", "content": ask.prompt}], "stream": True}
    start, tokens = time.time(), 0
    first: float | None = None
    last: float | None = None

    def sent(ending: Any, **more: Any) -> Sent:
        return Sent(
            policy=ask.policy,
            prompt=ask.prompt,
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
                return sent("refused", status=status, retry_after=retry, detail=detail)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return sent("answered", status=status)
                if not _has_text(data):
                    continue
                last = time.time()
                first = first or last
                tokens += 1
                if ask.leave_after is not None and tokens >= ask.leave_after:
                    return sent("aborted", status=status)
            raise StreamBrokenError("the stream ended without [DONE]")
    except httpx.TimeoutException as error:
        return sent("hung", detail=repr(error))
    except (httpx.HTTPError, StreamBrokenError, json.JSONDecodeError) as error:
        return sent("lost", detail=repr(error))


def _has_text(data: str) -> bool:
    """Whether a chunk carries text.

    Raises:
        StreamBrokenError: it carries an error.
    """
    chunk = json.loads(data)
    if "error" in chunk:
        raise StreamBrokenError(data[:200])
    return any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices", ()))
