"""Plays a scenario against a server: warm-up, rate, phases, and what is left afterwards."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import httpx

from sluice.loadtest.clients.guidellm_runs import Guides, Target, guides
from sluice.loadtest.clients.request_result import Sent
from sluice.loadtest.clients.streaming import ask_in_turn, ask_when_due, send
from sluice.loadtest.probes.memory import MemoryWatch
from sluice.loadtest.probes.metrics import Scrape, changes, parse, scrape, scrape_every, settled
from sluice.loadtest.report.results import Measured, Results
from sluice.loadtest.report.summary import summarize, window
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import (
    Ask,
    Phase,
    Plan,
    body_of,
    phases,
    plan,
    questions,
    saturating,
)

_WARM_UP_CLIENTS = 4

Say = Callable[[str], None]


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
    watch = MemoryWatch(url) if scenario.memory else None
    with tempfile.TemporaryDirectory(prefix="sluice-load-") as folder:
        async with (
            _client(url, api_key, scenario.deadline) as client,
            _beside(watch),
            guides(Path(folder)) as guided,
        ):
            model = await _served(client)
            before = await _seen(client, scenario)
            await _try_policies(client, scenario, model)
            target = Target(url, model, api_key, scenario.deadline)
            await _warm_up(client, scenario, model)
            rate = await _rate(client, scenario, target, guided, say)
            measured = []
            for phase in phases(scenario):
                say(_describe(scenario, phase, rate))
                drawn = plan(scenario, phase, rate, model)
                measured.append(await _measure(client, scenario, phase, drawn, target, guided))
            left, seconds = await settled(client) if scenario.metrics else ({}, 0.0)
            after = await _seen(client, scenario)
    return Results(
        scenario=scenario,
        url=url,
        model=model,
        rate=rate,
        phases=tuple(measured),
        changes=changes(before, after),
        left=left,
        settled=seconds,
        memory=None if watch is None else watch.memory,
        versions={name: version(name) for name in ("sluice", "guidellm")},
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
async def _beside(watch: MemoryWatch | None) -> AsyncIterator[None]:
    """Watch the memory as long as the block runs."""
    if watch is None:
        yield
        return
    async with _running(watch.run()):
        yield


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have work go on beside the block; it ends with it, and what it raised is raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        raise outcome


async def _served(client: httpx.AsyncClient) -> str:
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


async def _seen(client: httpx.AsyncClient, scenario: Scenario) -> Scrape:
    return await scrape(client) if scenario.metrics else parse("")


async def _try_policies(client: httpx.AsyncClient, scenario: Scenario, model: str) -> None:
    for policy in scenario.policies:
        prompt = next(questions(scenario, "try", policy.name))
        found = await send(client, Ask(prompt, policy.name, body_of(scenario, policy, model)))
        if found.ending != "answered":
            raise ServerRefusesError(
                f"policy {policy.name}: {found.ending}, {found.status or 'no status'}: "
                f"{found.detail}"
            )


async def _warm_up(client: httpx.AsyncClient, scenario: Scenario, model: str) -> None:
    until = time.time() + scenario.warm_up
    await asyncio.gather(
        *(
            ask_in_turn(
                client,
                (
                    Ask(prompt, policy.name, body_of(scenario, policy, model))
                    for prompt in questions(scenario, "warm-up", policy.name, number)
                ),
                until,
            )
            for policy in scenario.policies
            for number in range(_WARM_UP_CLIENTS)
        )
    )


async def _rate(
    client: httpx.AsyncClient, scenario: Scenario, target: Target, guided: Guides, say: Say
) -> float | None:
    """Requests per second at stage 1; None of concurrent clients."""
    if scenario.arrivals.process == "concurrent" or scenario.arrivals.rate is not None:
        return scenario.arrivals.rate
    probe = saturating(scenario)
    say(f"measuring the saturating rate with {probe.arrivals.streams} clients")
    phase = Phase(0, scenario.turn_names[0], 1.0)
    drawn = plan(probe, phase, None, target.model)
    found = await _measure(client, probe, phase, drawn, target, guided)
    answered = [each.tokens for each in found.sent if each.ending == "answered"]
    if not any(answered):
        raise ServerRefusesError("nothing was answered while the saturating rate was measured")
    # Clients leave at the end; their tokens count too, or the rate would be too low.
    throughput = summarize(found.sent, scenario.objectives, window(found.sent)).throughput
    return throughput / mean(answered)


def _describe(scenario: Scenario, phase: Phase, rate: float | None) -> str:
    what = f"{scenario.arrivals.streams} clients"
    if rate is not None:
        what = f"{rate * phase.stage:.1f} requests per second"
    return f"round {phase.round + 1} of {scenario.rounds}, {phase.turn}: {what}"


async def _measure(
    client: httpx.AsyncClient,
    scenario: Scenario,
    phase: Phase,
    drawn: Plan,
    target: Target,
    guided: Guides,
) -> Measured:
    """Play one phase to the last end."""
    before = await _seen(client, scenario)
    taken: list[float] = []

    async def scraping() -> None:
        if drawn.scraped and scenario.scrape_every is not None:
            await scrape_every(client, scenario.scrape_every, taken)

    async with _running(scraping()):
        found = await _send_all(client, scenario, drawn, target, guided)
    after = await _seen(client, scenario)
    sent = sorted((each for part in found for each in part), key=lambda each: each.start)
    return Measured(phase, tuple(sent), changes(before, after), tuple(taken))


async def _send_all(
    client: httpx.AsyncClient, scenario: Scenario, drawn: Plan, target: Target, guided: Guides
) -> list[list[Sent]]:
    """guidellm and the clients that leave, side by side, from one start on."""
    started: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    if not drawn.steady:
        started.set_result(time.time())

    async def leaving() -> list[Sent]:
        began = await started
        return await ask_when_due(client, drawn.leaving, began)

    async def leaver(asks: Iterator[Ask]) -> list[Sent]:
        began = await started
        return await ask_in_turn(client, asks, began + scenario.duration)

    try:
        async with asyncio.TaskGroup() as group:
            work = [guided.play(load, target, scenario.duration, started) for load in drawn.steady]
            work += [leaving(), *(leaver(asks) for asks in drawn.leavers)]
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
