"""Requests and results made up for tests of what comes after them."""

from __future__ import annotations

import random
from typing import Any

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.probes.memory import Memory
from sluice.loadtest.probes.metrics import changes, parse
from sluice.loadtest.report.results import PhaseResult, Results
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import Phase

BEFORE = """
# TYPE a_total counter
a_total{kind="x"} 3
# TYPE level gauge
level 5
"""
AFTER = """
# TYPE a_total counter
a_total{kind="x"} 10
a_total{kind="<b>y</b>"} 2
# TYPE level gauge
level 9
# TYPE seconds histogram
seconds_bucket{le="1.0"} 1
seconds_bucket{le="+Inf"} 2
seconds_count 2
seconds_sum 4.5
"""


def answered(
    start: float, ttft: float, gap: float, tokens: int, policy: str = "p"
) -> RequestResult:
    last = start + ttft + gap * (tokens - 1)
    return RequestResult(
        policy=policy,
        prompt="ask",
        due=start - 0.001,
        start=start,
        first=start + ttft,
        last=last,
        end=last + 0.01,
        tokens=tokens,
        ending="answered",
        status=200,
    )


def ended(start: float, ending: Any, **more: Any) -> RequestResult:
    fields = {
        "policy": "p",
        "prompt": "ask",
        "due": None,
        "start": start,
        "first": None,
        "last": None,
        "end": start + 0.5,
        "tokens": 0,
        **more,
    }
    return RequestResult(ending=ending, **fields)


def requests(count: int, seed: int, policy: str = "p") -> tuple[RequestResult, ...]:
    rng = random.Random(seed)
    return tuple(
        answered(
            1000 + i / 10, rng.uniform(0.05, 0.5), rng.uniform(0.01, 0.1), rng.randint(1, 9), policy
        )
        for i in range(count)
    )


def results(
    scenario: Scenario, *phases: tuple[Phase, tuple[RequestResult, ...]], **fields: Any
) -> Results:
    """A run of these phases."""
    changed = changes(parse(BEFORE), parse(AFTER))
    wanted = {
        "scenario": scenario,
        "url": "http://127.0.0.1:1",
        "model": "demo",
        "rate": 10.0,
        "phases": tuple(PhaseResult(phase, sent, changed, (0.01, 0.03)) for phase, sent in phases),
        "changes": changed,
        "left": {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0},
        "idle_seconds": 0.1,
        "memory": Memory((1000.0, 1010.0, 1020.0), (100.0, 101.0, 102.0)),
        "versions": {"sluice": "1"},
        **fields,
    }
    return Results(**wanted)
