"""Who sends what, and when, in one phase of a scenario: drawn by seed, before anything is sent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from sluice.loadtest.workload.arrivals import arrival_times
from sluice.loadtest.workload.fields import Arrivals, Policy
from sluice.loadtest.workload.prompts import prompts
from sluice.loadtest.workload.scenario import UNSCRAPED, Scenario, ScenarioError


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that a client of ours will send.

    Attributes:
        prompt: the user's message.
        policy: its name in the report.
        body: everything else of the request's body.
        due: seconds from the start, or None for at once.
        leave_after: tokens after which the client leaves, or None for staying.
    """

    prompt: str
    policy: str
    body: dict[str, Any]
    due: float | None = None
    leave_after: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch that is measured by itself.

    Attributes:
        round: 0-based.
        turn: what has its turn: a policy, `scraped`, `unscraped`, or `all`.
        stage: multiple of the rate.
    """

    round: int
    turn: str
    stage: float


_EACH_PER_SECOND, _ALL_PER_SECOND = 8, 200
"""Prompts drawn for clients that ask without end: once they are used up, the phase is over."""


@dataclass(frozen=True, slots=True)
class SteadyLoad:
    """Requests of one policy whose clients stay to the end: what guidellm sends.

    Attributes:
        policy: of all of them.
        body: of a request, but for its prompt and the model.
        prompts: in order.
        due: seconds from the start for each prompt; None for `streams` clients without end.
        streams: clients, if `due` is None.
    """

    policy: str
    body: dict[str, Any]
    prompts: tuple[str, ...]
    due: tuple[float, ...] | None = None
    streams: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One phase.

    Attributes:
        steady: by policy; those without a request are left out.
        leaving: requests at their time, whose clients leave.
        leavers: endless requests of each client that always leaves.
        scraped: whether `/metrics` is scraped meanwhile.
    """

    steady: tuple[SteadyLoad, ...]
    leaving: tuple[PlannedRequest, ...]
    leavers: tuple[Iterator[PlannedRequest], ...]
    scraped: bool


def phases(scenario: Scenario) -> list[Phase]:
    """All phases in order; turns change places from round to round."""
    turns = scenario.turn_names
    return [
        Phase(number, turn, stage)
        for number in range(scenario.rounds)
        for turn in (turns if number % 2 == 0 else turns[::-1])
        for stage in scenario.arrivals.stages
    ]


def draw_plan(scenario: Scenario, phase: Phase, rate: float | None, model: str) -> Plan:
    """Draw a phase.

    Turns of a round have the same arrivals and other prompts: an answer of one turn must not be
    quicker because the turn before has filled the prefix cache.

    Args:
        scenario: it is of.
        phase: which one.
        rate: requests per second at stage 1, if they come at a rate.
        model: to ask.
    """
    chosen = [
        policy
        for policy in scenario.policies
        if scenario.turns != "policies" or policy.name == phase.turn
    ]
    steady, leaving, leavers = (
        _concurrent(scenario, phase, chosen, model)
        if rate is None
        else _arriving(scenario, phase, chosen, rate * phase.stage, model)
    )
    scraped = scenario.scrape_every is not None and phase.turn != UNSCRAPED
    return Plan(steady, leaving, leavers, scraped)


def saturation_scenario(scenario: Scenario) -> Scenario:
    """The scenario that measures the rate of one that has none: as many clients as it names."""
    saturation = scenario.arrivals.saturation
    assert saturation is not None
    return scenario.model_copy(
        update={
            "arrivals": Arrivals(process="concurrent", streams=saturation.streams),
            "duration": saturation.seconds,
            "disconnects": None,
            "seed": _number(scenario, "saturation"),
        }
    )


def request_body(scenario: Scenario, policy: Policy, model: str | None = None) -> dict[str, Any]:
    """A request's body, but for its prompt."""
    fields = scenario.prompts
    body: dict[str, Any] = {"max_tokens": fields.max_tokens, "temperature": 0, **policy.body}
    if fields.ignore_eos:
        body["ignore_eos"] = True
    return body if model is None else {"model": model, **body}


def draw_prompts(scenario: Scenario, *purpose: Any) -> Iterator[str]:
    """Prompts without end for one purpose."""
    return prompts(scenario.prompts, _seed(scenario, *purpose))


def policy_requests(
    scenario: Scenario, policy: Policy, model: str, *purpose: Any
) -> Iterator[PlannedRequest]:
    """Requests of a policy without end for one purpose, to be sent at once and to the end."""
    body = request_body(scenario, policy, model)
    for prompt in draw_prompts(scenario, *purpose):
        yield PlannedRequest(prompt, policy.name, body)


_Loads = tuple[
    tuple[SteadyLoad, ...], tuple[PlannedRequest, ...], tuple[Iterator[PlannedRequest], ...]
]


def _arriving(
    scenario: Scenario, phase: Phase, policies: list[Policy], rate: float, model: str
) -> _Loads:
    rng = np.random.default_rng(_number(scenario, "arrivals", phase.round, phase.stage))
    arrivals = scenario.arrivals
    assert arrivals.process != "concurrent"
    due = arrival_times(arrivals.process, rate, scenario.duration, rng, arrivals.bursts)
    weights = np.array([policy.weight for policy in policies])
    whose = rng.choice(len(policies), size=len(due), p=weights / weights.sum())
    leave = _leave_after(scenario, rng, len(due))
    questions = list(islice(draw_prompts(scenario, "phase", *_phase_key(phase)), len(due)))
    steady = []
    for number, policy in enumerate(policies):
        own = [i for i in range(len(due)) if whose[i] == number and not leave[i]]
        if own:
            texts, times = tuple(questions[i] for i in own), tuple(float(due[i]) for i in own)
            steady.append(SteadyLoad(policy.name, request_body(scenario, policy), texts, due=times))
    leaving = tuple(
        PlannedRequest(
            questions[i],
            policies[whose[i]].name,
            request_body(scenario, policies[whose[i]], model),
            due=float(due[i]),
            leave_after=int(leave[i]),
        )
        for i in range(len(due))
        if leave[i]
    )
    return tuple(steady), leaving, ()


def _leave_after(scenario: Scenario, rng: np.random.Generator, count: int) -> list[int]:
    """Tokens after which each client leaves; 0 of those that stay."""
    if scenario.disconnects is None:
        return [0] * count
    leaves = rng.random(count) < scenario.disconnects.share
    low, high = scenario.disconnects.after_tokens
    return [int(tokens) for tokens in leaves * rng.integers(low, high, count, endpoint=True)]


def _concurrent(scenario: Scenario, phase: Phase, policies: list[Policy], model: str) -> _Loads:
    streams = scenario.arrivals.streams
    assert streams is not None
    share = 0.0 if scenario.disconnects is None else scenario.disconnects.share
    steady, leavers = [], []
    for policy, clients in zip(policies, split(streams, policies), strict=True):
        leaving = round(share * clients)
        if clients > leaving:
            most = min(_EACH_PER_SECOND * (clients - leaving), _ALL_PER_SECOND)
            count = math.ceil(scenario.duration * most)
            texts = islice(draw_prompts(scenario, "phase", *_phase_key(phase), policy.name), count)
            body = request_body(scenario, policy)
            steady.append(SteadyLoad(policy.name, body, tuple(texts), streams=clients - leaving))
        leavers += [
            _leaver(scenario, policy, model, "leaver", *_phase_key(phase), policy.name, number)
            for number in range(leaving)
        ]
    if share and not leavers:
        raise ScenarioError(f"disconnects.share: {share:g} of {streams} clients is nobody")
    return tuple(steady), (), tuple(leavers)


def _leaver(
    scenario: Scenario, policy: Policy, model: str, *purpose: Any
) -> Iterator[PlannedRequest]:
    assert scenario.disconnects is not None
    low, high = scenario.disconnects.after_tokens
    rng = np.random.default_rng(_number(scenario, *purpose))
    for request in policy_requests(scenario, policy, model, *purpose):
        yield replace(request, leave_after=int(rng.integers(low, high, endpoint=True)))


def split(streams: int, policies: list[Policy]) -> list[int]:
    """Clients by policy, in proportion to the weights.

    Raises:
        ScenarioError: a policy would have none.
    """
    total = sum(policy.weight for policy in policies)
    exact = [streams * policy.weight / total for policy in policies]
    counts = [int(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: streams - sum(counts)]:
        counts[i] += 1
    for policy, count in zip(policies, counts, strict=True):
        if count == 0:
            raise ScenarioError(
                f"arrivals.streams: {streams} clients leave none for policy {policy.name}"
            )
    return counts


def _phase_key(phase: Phase) -> tuple[Any, ...]:
    return phase.round, phase.turn, phase.stage


def _seed(scenario: Scenario, *purpose: Any) -> str:
    return "/".join(str(part) for part in (scenario.seed, *purpose))


def _number(scenario: Scenario, *purpose: Any) -> int:
    digest = hashlib.sha256(_seed(scenario, *purpose).encode()).digest()
    return int.from_bytes(digest[:4], "big") // 2
