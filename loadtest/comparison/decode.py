"""A batch of streamed answers, and how long its tokens took."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


class AnswerError(Exception):
    """A server refused a request, or its answer is not as asked."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Of requests that were sent at once.

    Attributes:
        decode: seconds from the moment when every request has its first token to the last token.
        total: seconds from sending them to the last token.
    """

    decode: float
    total: float


async def timed_batch(
    client: httpx.AsyncClient,
    model: str,
    prompts: Sequence[str],
    routings: Sequence[Mapping[str, Any] | None],
    tokens: int,
    first_counted: int = 0,
) -> BatchTimes:
    """Send prompts at once as chats, and follow their streams.

    Args:
        client: with the server's base URL.
        model: its model id.
        prompts: what a user says.
        routings: `routing` object of each; None sends none.
        tokens: of every answer; an end token does not end it.
        first_counted: the times are of this request and those after it.

    Raises:
        AnswerError: a request was refused, or its answer has another number of tokens.
        httpx.HTTPError: the server is not there.
    """
    began = time.perf_counter()
    streams = [
        _stream(client, model, prompt, routing, tokens)
        for prompt, routing in zip(prompts, routings, strict=True)
    ]
    ends = (await asyncio.gather(*streams))[first_counted:]
    last = max(end for _, end in ends)
    return BatchTimes(last - max(first for first, _ in ends), last - began)


async def _stream(
    client: httpx.AsyncClient,
    model: str,
    prompt: str,
    routing: Mapping[str, Any] | None,
    tokens: int,
) -> tuple[float, float]:
    """Times of the first and of the last token, on the clock of `time.perf_counter`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if routing is None else {"routing": dict(routing)}),
    }
    first = last = None
    counted = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise AnswerError((await response.aread()).decode(errors="replace")[:500])
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise AnswerError(line[:500])
            if chunk["choices"]:
                # The first chunk has the role and comes with the first token.
                last = time.perf_counter()
                first = first or last
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
    if first is None or last is None or counted != tokens:
        raise AnswerError(f"{counted} tokens came, not {tokens}")
    return first, last
