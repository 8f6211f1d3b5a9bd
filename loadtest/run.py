"""Plays a scenario against a server: warm-up, rate, phases, and what is left afterwards."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import httpx

from sluice.loadtest.clients.guidellm_runs import GuidellmPool, Target, guidellm_pool
from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.clients.streaming import send, send_in_turn, send_when_due
from sluice.loadtest.probes.memory import MemoryWatch
from sluice.loadtest.probes.metrics import (
    Scrape,
    changes,
    parse,
    scrape,
    scrape_every,
    wait_until_idle,
)
from sluice.loadtest.report.results import PhaseResult, Results
from sluice.loadtest.report.summary import summarize, window
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import (
    Phase,
    Plan,
    PlannedRequest,
    draw_plan,
    phases,
    policy_requests,
    saturation_scenario,
)
from sluice.models.offline.provenance import machine

_WARM_UP_CLIENTS = 4
_BUILD_INFO = "sluice_build_info"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Clients:
    """Everything that sends requests to the server: guidellm, and our own client."""

    target: Target
    guidellm: GuidellmPool
    http: httpx.AsyncClient


class ServerRefusesError(Exception):
    """The server is not there, or does not do what the scenario asks for."""


async def run_scenario(scenario: Scenario, url: str, api_key: str | None, say: Say) -> Results:
    """Play a scenario.

    Args:
        scenario: what to play.
        url: of the server, without `/v1`.
        api_key: bearer key, if the server wants one.
        say: told what is going on, a line at a time.

    Raises:
        ServerRefusesError: the server is not there or refuses a policy.
        ServerNotFoundError: its memory is to be watched and it is not on this machine.
        ScenarioError: fewer clients than policies, or none to leave.
    """
    began = datetime.now(UTC)
    watch = MemoryWatch(url) if scenario.memory else None
    with tempfile.TemporaryDirectory(prefix="sluice-load-") as folder:
        async with (
            _client(url, api_key, scenario.deadline) as client,
            _watching_memory(watch),
            guidellm_pool(Path(folder)) as guidellm,
        ):
            model = await _first_model(client)
            before = await _metrics(client, scenario)
            await _try_policies(client, scenario, model)
            await _warm_up(client, scenario, model)
            target = Target(url, model, api_key, scenario.deadline)
            clients = _Clients(target, guidellm, client)
            rate = await _rate(clients, scenario, say)
            phase_results = []
            for phase in phases(scenario):
                say(_describe(scenario, phase, rate))
                plan = draw_plan(scenario, phase, rate, model)
                phase_results.append(await _measure(clients, scenario, phase, plan))
            left, seconds = await wait_until_idle(client) if scenario.metrics else ({}, 0.0)
            after = await _metrics(client, scenario)
    return Results(
        scenario=scenario,
        url=url,
        model=model,
        rate=rate,
        phases=tuple(phase_results),
        changes=changes(before, after),
        left=left,
        idle_seconds=seconds,
        memory=None if watch is None else watch.memory,
        versions={"sluice": version("vllm-sluice"), "guidellm": version("guidellm")}
        | _server_versions(after),
        date=began.isoformat(timespec="seconds"),
        hardware=machine(),
    )


@asynccontextmanager
async def _client(
    url: str, api_key: str | None, deadline: float
) -> AsyncIterator[httpx.AsyncClient]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=httpx.Timeout(deadline), limits=limits
    ) as client:
        yield client


@asynccontextmanager
async def _watching_memory(watch: MemoryWatch | None) -> AsyncIterator[None]:
    """Watch the memory as long as the block runs."""
    if watch is None:
        yield
        return
    async with _in_background(watch.run()):
        yield


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have work go on beside the block; it ends with it, and what it raised is raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        raise outcome


async def _first_model(client: httpx.AsyncClient) -> str:
    """The first model that the server lists.

    Raises:
        ServerRefusesError: it does not answer, or lists none.
    """
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ServerRefusesError(f"{client.base_url}: no model to ask: {error}") from None


async def _metrics(client: httpx.AsyncClient, scenario: Scenario) -> Scrape:
    return await scrape(client) if scenario.metrics else parse("")


def _server_versions(scraped: Scrape) -> dict[str, str]:
    """What the server says of itself, if it does."""
    labels = next((dict(s.labels) for s in scraped.values if s.name == _BUILD_INFO), {})
    names = {"version": "server's sluice", "vllm_version": "server's vLLM"}
    return {title: labels[name] for name, title in names.items() if name in labels}


async def _try_policies(client: httpx.AsyncClient, scenario: Scenario, model: str) -> None:
    for policy in scenario.policies:
        requests = policy_requests(scenario, policy, model, "try", policy.name)
        result = await send(client, next(requests))
        if result.ending != "answered":
            raise ServerRefusesError(
                f"policy {policy.name}: {result.ending}, {result.status or 'no status'}: "
                f"{result.detail}"
            )


async def _warm_up(client: httpx.AsyncClient, scenario: Scenario, model: str) -> None:
    until = time.time() + scenario.warm_up
    await asyncio.gather(
        *(
            send_in_turn(
                client,
                policy_requests(scenario, policy, model, "warm-up", policy.name, number),
                until,
            )
            for policy in scenario.policies
            for number in range(_WARM_UP_CLIENTS)
        )
    )


async def _rate(clients: _Clients, scenario: Scenario, say: Say) -> float | None:
    """Requests per second at stage 1; None of concurrent clients."""
    if scenario.arrivals.process == "concurrent" or scenario.arrivals.rate is not None:
        return scenario.arrivals.rate
    probe = saturation_scenario(scenario)
    say(f"measuring the saturating rate with {probe.arrivals.streams} clients")
    phase = Phase(0, scenario.turn_names[0], 1.0)
    plan = draw_plan(probe, phase, None, clients.target.model)
    requests = (await _measure(clients, probe, phase, plan)).requests
    answered = [each.tokens for each in requests if each.ending == "answered"]
    if not any(answered):
        raise ServerRefusesError("nothing was answered while the saturating rate was measured")
    # Clients leave at the end; their tokens count too, or the rate would be too low.
    summary = summarize(requests, scenario.objectives, window(requests))
    return summary.throughput / mean(answered)


def _describe(scenario: Scenario, phase: Phase, rate: float | None) -> str:
    what = f"{scenario.arrivals.streams} clients"
    if rate is not None:
        what = f"{rate * phase.stage:.1f} requests per second"
    return f"round {phase.round + 1} of {scenario.rounds}, {phase.turn}: {what}"


async def _measure(clients: _Clients, scenario: Scenario, phase: Phase, plan: Plan) -> PhaseResult:
    """Play one phase to the last end."""
    before = await _metrics(clients.http, scenario)
    taken: list[float] = []

    async def scraping() -> None:
        if plan.scraped and scenario.scrape_every is not None:
            await scrape_every(clients.http, scenario.scrape_every, taken)

    async with _in_background(scraping()):
        by_client = await _send_all(clients, scenario, plan)
    after = await _metrics(clients.http, scenario)
    requests = sorted((each for part in by_client for each in part), key=lambda each: each.start)
    return PhaseResult(phase, tuple(requests), changes(before, after), tuple(taken))


async def _send_all(clients: _Clients, scenario: Scenario, plan: Plan) -> list[list[RequestResult]]:
    """guidellm and the clients that leave, side by side, from one start on."""
    started: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    if not plan.steady:
        started.set_result(time.time())

    async def leaving() -> list[RequestResult]:
        began = await started
        return await send_when_due(clients.http, plan.leaving, began)

    async def leaver(requests: Iterator[PlannedRequest]) -> list[RequestResult]:
        began = await started
        return await send_in_turn(clients.http, requests, began + scenario.duration)

    try:
        async with asyncio.TaskGroup() as group:
            work = [
                clients.guidellm.play(load, clients.target, scenario.duration, started)
                for load in plan.steady
            ]
            work += [leaving(), *(leaver(requests) for requests in plan.leavers)]
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
