"""What a run of a scenario found: its phases, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np

from sluice.loadtest.clients.request_result import Sent
from sluice.loadtest.probes.memory import Memory, Slope
from sluice.loadtest.probes.metrics import Change
from sluice.loadtest.report.summary import Summary, summarize, window
from sluice.loadtest.workload.scenario import ALL, Scenario
from sluice.loadtest.workload.schedule import Phase


@dataclass(frozen=True, slots=True)
class Measured:
    """A phase and what was seen of it.

    Attributes:
        phase: which one.
        sent: its requests, by the time that they were sent.
        changes: what it added to the server's counters.
        scrapes: seconds of each scrape.
    """

    phase: Phase
    sent: tuple[Sent, ...]
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
        settled: seconds until these were there.
        memory: of the server, or None.
        versions: of what took part, by name.
    """

    scenario: Scenario
    url: str
    model: str
    rate: float | None
    phases: tuple[Measured, ...]
    changes: tuple[Change, ...]
    left: dict[str, float]
    settled: float
    memory: Memory | None
    versions: dict[str, str]

    @property
    def sent(self) -> tuple[Sent, ...]:
        """All requests."""
        return tuple(each for measured in self.phases for each in measured.sent)

    @property
    def scrapes(self) -> tuple[float, ...]:
        """Seconds of all scrapes."""
        return tuple(each for measured in self.phases for each in measured.scrapes)

    def rows(self) -> tuple[Row, ...]:
        """A row per phase and policy, and one of all where a phase has several."""
        return self._rows

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        # A report asks for them a dozen times; those of a soak take a quarter of a second each.
        rows: list[Row] = []
        for measured in self.phases:
            seconds = window(measured.sent)
            by_policy: dict[str, list[Sent]] = {}
            for each in measured.sent:
                by_policy.setdefault(each.policy, []).append(each)
            whole = {} if len(by_policy) == 1 else {ALL: [*measured.sent]}
            rows += [
                Row(measured.phase, name, summarize(sent, self.scenario.objectives, seconds))
                for name, sent in (whole | by_policy).items()
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
        found: dict[tuple[str, float], list[float]] = {}
        for phase, value in totals.items():
            of_base = totals.get(replace(phase, turn=base))
            if phase.turn != base and of_base:
                found.setdefault((phase.turn, phase.stage), []).append(value / of_base)
        return [Ratio(turn, base, stage, tuple(each)) for (turn, stage), each in found.items()]

    def throughput_kept(self) -> float | None:
        """Throughput at the last stage over the best stage's, median over rounds and turns."""
        runs: dict[tuple[int, str], list[float]] = {}
        for row in self.totals():
            runs.setdefault((row.phase.round, row.phase.turn), []).append(row.summary.throughput)
        kept = [each[-1] / max(each) for each in runs.values() if max(each)]
        return median(kept) if kept else None

    def memory_slope(self) -> Slope | None:
        """Growth of the server's memory per 1,000 requests, from the first phase on."""
        if self.memory is None or not self.sent:
            return None
        began = min(each.start for each in self.sent)
        return self.memory.slope([each.end for each in self.sent], began)

    def scrape_ms(self, percentile: float) -> float | None:
        """Milliseconds of a scrape."""
        return 1000 * float(np.percentile(self.scrapes, percentile)) if self.scrapes else None
