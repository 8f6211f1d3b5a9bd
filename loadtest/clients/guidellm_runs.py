"""Requests of clients that stay to the end: sent by guidellm, in processes of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sluice.loadtest.clients.guidellm_process import DONE, STARTED
from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.workload.schedule import SteadyLoad

_LEAD = 1.0
"""Seconds before requests that come at a time: guidellm hands its workers nothing before its own
start, and the first ones would be late."""
_GRACE = 120.0
_SETTINGS = {
    # One worker sends in the order of the file; guidellm has it take 10,240 requests at once.
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",
    "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class GuidellmError(Exception):
    """guidellm ended without a result."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and how to ask it.

    Attributes:
        url: of the server, without `/v1`.
        model: id of the model.
        api_key: bearer key, if the server wants one.
        deadline: seconds without a byte after which a request counts as hung.
    """

    url: str
    model: str
    api_key: str | None
    deadline: float


class GuidellmPool:
    """guidellm processes, started when there are more loads at once than before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[Process] = []
        self._all: list[Process] = []
        self._numbers = count()

    async def play(
        self, load: SteadyLoad, target: Target, duration: float, started: asyncio.Future[float]
    ) -> list[RequestResult]:
        """Send a load to its last end.

        Args:
            load: what to send.
            target: the server.
            duration: seconds that requests keep coming.
            started: gets the Unix seconds that the load's times count from, if it has none yet.

        Raises:
            GuidedError: guidellm ended without a result.
        """
        name = self._folder / f"load-{next(self._numbers)}"
        spec, record = name.with_suffix(".json"), name.with_suffix(".results.jsonl")
        data = name.with_suffix(".prompts.jsonl")
        data.write_text(_data(load), encoding="utf-8")
        wire = _spec(load, target, duration, data, record)
        spec.write_text(json.dumps(wire), encoding="utf-8")
        async with self._process() as process:
            assert process.stdin is not None
            process.stdin.write(f"{spec}\n".encode())
            try:
                async with asyncio.timeout(duration + target.deadline + _GRACE):
                    await self._follow(process, started, 0.0 if load.due is None else _LEAD)
            except TimeoutError:
                raise GuidellmError(f"guidellm does not come to an end{self._log_tail()}") from None
        results = _results(load, record)
        if load.due is not None and len(results) != len(load.prompts):
            raise GuidellmError(f"guidellm sent {len(results)} of {len(load.prompts)} requests")
        return results

    async def close(self) -> None:
        """End all processes."""
        for process in self._all:
            # guidellm's workers are in the same session, and outlive it otherwise.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in self._all))

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[Process]:
        """An idle process, or a new one; idle again afterwards if all went well."""
        process = self._idle.pop() if self._idle else await self._new()
        yield process
        self._idle.append(process)

    async def _new(self) -> Process:
        # What guidellm loads must not stay in the user's cache, nor a .env file count.
        caches = {"HF_DATASETS_CACHE": str(self._folder / "datasets")}
        with (self._folder / "guidellm.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "sluice.loadtest.clients.guidellm_process",
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env={**os.environ, **_SETTINGS, **caches},
                cwd=self._folder,
                start_new_session=True,
            )
        self._all.append(process)
        return process

    async def _follow(self, process: Process, started: asyncio.Future[float], lead: float) -> None:
        """Read what the process says until it is done.

        Raises:
            GuidedError: it ended first.
        """
        assert process.stdout is not None
        while line := (await process.stdout.readline()).decode():
            word, _, rest = line.strip().partition(" ")
            if word == STARTED:
                if not started.done():
                    started.set_result(float(rest) + lead)
            elif word == DONE:
                return
        raise GuidellmError(f"guidellm ended{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = (self._folder / "guidellm.log").read_text(errors="replace").strip().splitlines()
        return ": " + "\n".join(lines[-5:]) if lines else ""


@asynccontextmanager
async def guidellm_pool(folder: Path) -> AsyncIterator[GuidellmPool]:
    """Processes for the time of the block; `folder` takes their files."""
    pool = GuidellmPool(folder)
    try:
        yield pool
    finally:
        await pool.close()


def _data(load: SteadyLoad) -> str:
    """guidellm's data set: a line a request."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in load.prompts]
    for row, due in zip(rows, load.due or (), strict=False):
        row["relative_timestamp"] = due + _LEAD
    return "".join(json.dumps(row) + "\n" for row in rows)


def _spec(
    load: SteadyLoad, target: Target, duration: float, data: Path, record: Path
) -> dict[str, Any]:
    profile: dict[str, Any] = {"kind": "replay", "schedule_turn": "timestamp"}
    if load.due is None:
        profile = {"kind": "concurrent", "streams": load.streams}
    return {
        "backend": {
            "kind": "sluice_http",
            "target": target.url,
            "model": target.model,
            "api_key": target.api_key,
            "timeout": target.deadline,
            "timeout_connect": target.deadline,
            "http2": False,
            "validate_backend": False,
            "extras": {"body": load.body},
            "record": str(record),
            "seconds": duration if load.due is None else None,
        },
        "profile": profile,
        "data": [{"kind": "json_file", "path": str(data)}],
        "outputs": [],
    }


def _results(load: SteadyLoad, record: Path) -> list[RequestResult]:
    """What the backend wrote down, in the order of ends; nothing if nothing was sent."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    if load.due is None:
        lines = [{**line, "due": None} for line in lines]
    return [RequestResult(policy=load.policy, **{"status": None, **line}) for line in lines]
