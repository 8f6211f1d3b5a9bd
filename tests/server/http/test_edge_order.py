"""What is asked first: room, size, key, and only then the body."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import Message
from support.edge import CAPABILITIES

from sluice.server.access.capability import Caller, Capability
from sluice.server.access.keys import Keys, digest_of
from sluice.server.admission import Admission
from sluice.server.http.plugin import edge_middleware
from sluice.server.http.state import Edge
from sluice.server.telemetry.metrics import RequestMetrics

KEYS = Keys(((digest_of("a-key"), Caller("alice", Capability.ADMIN)),))
GOOD = {"authorization": "Bearer a-key"}
BAD_ROUTING = {"model": "m", "routing": {"dept": 1}}


def finish(steps: Coroutine[Any, Any, None]) -> None:
    """Run the steps of a test; what would wait for ever fails."""
    asyncio.run(asyncio.wait_for(steps, 30))


class App:
    """Our middleware around one route, with room for one request of 1000 bytes."""

    def __init__(self, max_body_bytes: int = 1000) -> None:
        args = Namespace(
            max_open_requests=1, retry_after=7, max_body_bytes=max_body_bytes, open_metrics=False
        )
        self.app = FastAPI(middleware=edge_middleware(args, KEYS))
        self.registry = CollectorRegistry()
        metrics = RequestMetrics([], self.registry)
        self.app.state.sluice = Edge(Admission(CAPABILITIES, {}), metrics, None)
        self.entered, self.let = asyncio.Event(), asyncio.Event()

        @self.app.post("/v1/completions")
        async def route() -> dict[str, int]:
            self.entered.set()
            await self.let.wait()
            return {}

    async def post(
        self, path: str, body: Any, headers: dict[str, str] = GOOD
    ) -> tuple[int, int, dict[str, str]]:
        """Status, how many parts of the body were read before it, and the headers of the answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [raw[start : start + 100] for start in range(0, len(raw), 100)]
        read = 0
        before = 0
        sent: list[Message] = []

        async def receive() -> Message:
            nonlocal read
            if read == len(parts):
                await asyncio.Event().wait()
            read += 1
            return {"type": "http.request", "body": parts[read - 1], "more_body": read < len(parts)}

        async def send(message: Message) -> None:
            nonlocal before
            before = before if sent else read
            sent.append(message)

        wire = {"content-type": "application/json", **headers}
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in wire.items()],
        }
        await self.app(scope, receive, send)
        said = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], before, said

    def refusals(self) -> float:
        """Counted refusals of routing."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "sluice_policy_rejections_total"
        )


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/v1/messages"])
@pytest.mark.parametrize("headers", [GOOD, {}])
@pytest.mark.parametrize("body", [BAD_ROUTING, {"prompt": "x" * 2000}])
def test_a_full_server_reads_and_checks_nothing(
    path: str, headers: dict[str, str], body: Any
) -> None:
    async def run() -> None:
        app = App()
        first = asyncio.create_task(app.post("/v1/completions", {}))
        await app.entered.wait()
        status, read, said = await app.post(path, body, headers)
        assert (status, read, said["retry-after"]) == (503, 0, "7")
        assert app.refusals() == 0
        app.let.set()
        assert (await first)[0] == 200

    finish(run())


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere", "/tokenize"])
def test_nothing_is_read_of_a_caller_without_a_key(path: str) -> None:
    async def run() -> None:
        app = App()
        assert (await app.post(path, BAD_ROUTING, {}))[:2] == (401, 0)
        assert app.refusals() == 0

    finish(run())


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/completions", 400), ("/tokenize", 400), ("/nowhere", 404)]
)
def test_only_paths_that_can_hold_routing_are_read(path: str, status: int) -> None:
    async def run() -> None:
        app = App()
        found, read, _ = await app.post(path, BAD_ROUTING)
        assert (found, read > 0) == (status, status == 400)
        assert app.refusals() == (status == 400)

    finish(run())


def test_a_body_over_the_limit_is_not_parsed() -> None:
    async def run() -> None:
        app = App()
        status, read, _ = await app.post("/v1/completions", {**BAD_ROUTING, "x": "y" * 5000})
        assert (status, read) == (413, 11)
        assert app.refusals() == 0

    finish(run())


@pytest.mark.parametrize(
    ("junk", "status"),
    [
        ("[" + "{}," * 60_000 + "{}]", 400),
        ("[" + "0," * 60_000 + "0]", 200),
        ('"' + "{" * 60_000 + '"', 200),
    ],
)
def test_a_body_of_very_many_objects_is_not_parsed(junk: str, status: int) -> None:
    """Small ones take a hundred times their bytes of memory, and seconds of the event loop."""

    async def run() -> None:
        app = App(max_body_bytes=10**6)
        app.let.set()
        raw = b'{"prompt": "p", "junk": ' + junk.encode() + b"}"
        assert (await app.post("/v1/completions", raw))[0] == status

    finish(run())
