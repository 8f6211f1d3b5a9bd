"""guidellm's HTTP backend, writing down how each request ended.

guidellm's own report leaves out statuses and headers of refusals, and now and then the last request
to end. The classes live here and not in the process's main module, because guidellm's workers are
processes of their own that import them by name.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
from guidellm.backends import Backend
from guidellm.backends.openai.http import OpenAIHTTPBackend
from guidellm.schemas import GenerationRequest, RequestInfo
from guidellm.schemas.backends import BackendArgs
from guidellm.schemas.backends.openai_http import OpenAIHTTPBackendArgs

from sluice.loadtest.clients.streaming import StreamBrokenError

KIND = "sluice_http"


class UnsentError(Exception):
    """A request that would have come after the end."""


@BackendArgs.register(KIND)
class SluiceBackendArgs(OpenAIHTTPBackendArgs):
    """Arguments of `SluiceBackend`.

    Attributes:
        record: file that gets a line of JSON for each request that was sent.
        seconds: from the first request on in which requests are sent; None for all.
    """

    kind: Literal["sluice_http"] = KIND  # type: ignore[assignment]
    record: Path
    seconds: float | None = None


@Backend.register(KIND)
class SluiceBackend(OpenAIHTTPBackend):
    """guidellm's own, but for the record, and for how it stops.

    guidellm stops after a time by cancelling what runs. Here that is answered to the end, as a
    client would have it, and what comes later is not sent.
    """

    def __init__(self, arguments: SluiceBackendArgs) -> None:
        super().__init__(arguments)
        self._record = arguments.record
        self._seconds = arguments.seconds
        self._until: float | None = None
        self._open = 0

    async def resolve(  # type: ignore[override]
        self, request: GenerationRequest, request_info: RequestInfo, history: Any = None
    ) -> AsyncIterator[Any]:
        """Send a request, follow it, and write down what became of it.

        Raises:
            UnsentError: the time is over.
            httpx.HTTPError: it failed; `StreamBrokenError` where its stream did.
        """
        if self._over():
            # Whoever still waits for an answer must not wait for these to be turned away.
            while self._open:
                await asyncio.sleep(0.05)
            raise UnsentError
        self._open += 1
        ended: dict[str, Any] = {"ending": "answered", "status": 200}
        tokens: int | None = None
        try:
            async for response, info in super().resolve(request, request_info, history):
                if response is not None:
                    tokens = response.output_metrics.total_tokens
                yield response, info
        except (asyncio.CancelledError, GeneratorExit):
            ended = {"ending": "aborted"}
            raise
        except Exception as error:
            ended = failure_fields(error)
            raise
        finally:
            self._open -= 1
            times = request_info.timings
            line = {
                "prompt": "".join(request.columns["text_column"]),
                "due": times.targeted_start,
                "start": times.request_start or time.time(),
                "first": times.first_token_iteration,
                "last": times.last_token_iteration,
                "end": times.request_end or time.time(),
                "tokens": times.token_iterations if tokens is None else tokens,
                **ended,
            }
            with self._record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _over(self) -> bool:
        if self._seconds is None:
            return False
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        return time.monotonic() >= self._until

    async def _aiter_lines(self, stream: httpx.Response) -> AsyncIterator[str]:
        """Lines of a stream that ends with its end mark and carries no error."""
        async for line in super()._aiter_lines(stream):
            if line.startswith('data: {"error"'):
                raise StreamBrokenError(line[:200])
            yield line
            if line == "data: [DONE]":
                return
        raise StreamBrokenError("the stream ended without [DONE]")


def failure_fields(error: Exception) -> dict[str, Any]:
    """`ending`, and what else is known of a request that failed."""
    if isinstance(error, httpx.HTTPStatusError):
        answer = error.response
        retry = "retry-after" in answer.headers
        return {"ending": "refused", "status": answer.status_code, "retry_after": retry}
    ending = "hung" if isinstance(error, httpx.TimeoutException) else "lost"
    return {"ending": ending, "detail": repr(error)[:300]}
