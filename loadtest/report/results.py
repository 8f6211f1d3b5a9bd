"""Results of a run: its phases, and the numbers drawn from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np

from sluice.loadtest.clients.request_result import RequestResult
from sluice.loadtest.probes.memory import Memory, Slope
from sluice.loadtest.probes.metrics import Change
from sluice.loadtest.report.summary import Summary, summarize, window
from sluice.loadtest.workload.scenario import ALL, Scenario
from sluice.loadtest.workload.schedule import Phase


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """A phase and what was seen of it.

    Attributes:
        phase: which one.
        requests: results of its requests, by the time that they were sent.
        changes: what it added to the server's counters.
        scrapes: seconds of each scrape.
    """

    phase: Phase
    requests: tuple[RequestResult, ...]
    changes: tuple[Change, ...]
    scrapes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report: a phase, and one policy of it or all."""

    phase: Phase
    policy: str
    summary: Summary


@dataclass(frozen=True, slots=True)
class Ratio:
    """One turn's number over the first turn's of the same round and stage, over rounds."""

    turn: str
    base: str
    stage: float
    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """Median."""
        return median(self.values)


@dataclass(frozen=True)
class Results:
    """A run.

    Attributes:
        scenario: what was played.
        url: of the server.
        model: that was asked.
        rate: requests per second at stage 1; None for concurrent clients.
        phases: in the order that they ran.
        changes: of the server's counters over all of them.
        left: running and waiting requests after the run.
        idle_seconds: how long it took until none was left, or until the run stopped waiting.
        memory: of the server, or None.
        versions: of what took part, by name.
        date: when it began, UTC, ISO 8601; None if nobody said.
        hardware: of the client's machine; None if nobody said.
    """

    scenario: Scenario
    url: str
    model: str
    rate: float | None
    phases: tuple[PhaseResult, ...]
    changes: tuple[Change, ...]
    left: dict[str, float]
    idle_seconds: float
    memory: Memory | None
    versions: dict[str, str]
    date: str | None = None
    hardware: str | None = None

    @property
    def requests(self) -> tuple[RequestResult, ...]:
        """All requests."""
        return tuple(each for result in self.phases for each in result.requests)

    @property
    def scrapes(self) -> tuple[float, ...]:
        """Seconds of all scrapes."""
        return tuple(each for result in self.phases for each in result.scrapes)

    def rows(self) -> tuple[Row, ...]:
        """A row per phase and policy, and one of all where a phase has several."""
        return self._rows

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        # A report asks for them a dozen times; those of a soak take a quarter of a second each.
        rows: list[Row] = []
        for result in self.phases:
            seconds = window(result.requests)
            by_policy: dict[str, list[RequestResult]] = {}
            for each in result.requests:
                by_policy.setdefault(each.policy, []).append(each)
            whole = {} if len(by_policy) == 1 else {ALL: [*result.requests]}
            rows += [
                Row(result.phase, name, summarize(requests, self.scenario.objectives, seconds))
                for name, requests in (whole | by_policy).items()
            ]
        return tuple(rows)

    def totals(self) -> list[Row]:
        """Rows of whole phases."""
        seen: dict[Phase, Row] = {}
        for row in self.rows():
            seen.setdefault(row.phase, row)
        return [*seen.values()]

    def ratios(self, number: Callable[[Summary], float]) -> list[Ratio]:
        """How every turn but the first compares with it; rounds without a base are left out."""
        base = self.scenario.turn_names[0]
        totals = {row.phase: number(row.summary) for row in self.totals()}
        by_turn: dict[tuple[str, float], list[float]] = {}
        for phase, value in totals.items():
            base_value = totals.get(replace(phase, turn=base))
            if phase.turn != base and base_value:
                by_turn.setdefault((phase.turn, phase.stage), []).append(value / base_value)
        return [Ratio(turn, base, stage, tuple(each)) for (turn, stage), each in by_turn.items()]

    def throughput_kept(self) -> float | None:
        """Throughput at the last stage over the best stage's, median over rounds and turns."""
        runs: dict[tuple[int, str], list[float]] = {}
        for row in self.totals():
            runs.setdefault((row.phase.round, row.phase.turn), []).append(row.summary.throughput)
        kept = [each[-1] / max(each) for each in runs.values() if max(each)]
        return median(kept) if kept else None

    def memory_slope(self) -> Slope | None:
        """Growth of the server's memory per 1,000 requests, from the first phase on."""
        if self.memory is None or not self.requests:
            return None
        began = min(each.start for each in self.requests)
        return self.memory.slope([each.end for each in self.requests], began)

    def scrape_ms(self, percentile: float) -> float | None:
        """Milliseconds of a scrape."""
        return 1000 * float(np.percentile(self.scrapes, percentile)) if self.scrapes else None
