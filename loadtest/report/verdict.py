"""What a run had to reach, and whether it did."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sluice.loadtest.report.results import Results

_TOO_BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar, what was found, and whether that will do."""

    bar: str
    found: str
    met: bool


def verdicts(results: Results) -> list[Verdict]:
    """Bars of every scenario, then those that the scenario names."""
    requests = results.requests
    silent = sum(
        each.ending == "refused" and each.status in _TOO_BUSY and not each.retry_after
        for each in requests
    )
    unexpected = sum(
        each.ending == "refused" and (each.status or 0) >= 500 and each.status not in _TOO_BUSY
        for each in requests
    )
    left = sum(results.left.values())
    always = [
        _none("no request hangs", sum(each.ending == "hung" for each in requests)),
        _none("no request is lost", sum(each.ending == "lost" for each in requests)),
        _none("no refusal for load is without Retry-After", silent),
        _none("no other server error", unexpected),
        _none("nothing is left running or waiting", round(left)),
        Verdict("something was answered", f"{len(requests)} sent", bool(_answered(results))),
    ]
    return [*always, *_scenario_bars(results)]


def overall_verdict(results: Results) -> Verdict:
    """One verdict of all bars."""
    each = verdicts(results)
    missed = [verdict.bar for verdict in each if not verdict.met]
    if not missed:
        return Verdict("Passed", f"all {len(each)} bars were met", True)
    return Verdict(
        "Failed", f"{len(missed)} of {len(each)} bars missed: {'; '.join(missed)}", False
    )


def _answered(results: Results) -> int:
    return sum(each.ending == "answered" for each in results.requests)


def _none(bar: str, count: int) -> Verdict:
    return Verdict(bar, str(count), count == 0)


def _scenario_bars(results: Results) -> list[Verdict]:
    bars = results.scenario.bars
    reached: list[Verdict] = []
    if bars.throughput_kept is not None:
        kept = results.throughput_kept()
        reached.append(
            _at_least("throughput at the last stage over the best", bars.throughput_kept, kept)
        )
    if bars.goodput_ratio is not None:
        for ratio in results.ratios(lambda summary: summary.goodput):
            bar = f"goodput of {ratio.turn} over {ratio.base}"
            reached.append(_at_least(bar, bars.goodput_ratio, ratio.middle))
    if bars.scraped_throughput is not None:
        for ratio in results.ratios(lambda summary: summary.throughput):
            bar = f"decode throughput, {ratio.turn} over {ratio.base}"
            reached.append(_at_least(bar, bars.scraped_throughput, ratio.middle))
    if bars.scrape_p99_ms is not None:
        reached.append(_at_most("scrape, p99, ms", bars.scrape_p99_ms, results.scrape_ms(99)))
    if bars.memory_mb_per_1000 is not None:
        slope = results.memory_slope()
        value = None if slope is None else slope.mb_per_1000
        reached.append(_at_most("memory, MB per 1,000 requests", bars.memory_mb_per_1000, value))
    return reached


def _at_least(bar: str, limit: float, value: float | None) -> Verdict:
    return Verdict(f"{bar}: at least {limit:g}", _shown(value), _known(value) >= limit)


def _at_most(bar: str, limit: float, value: float | None) -> Verdict:
    # A comparison with NaN is False either way.
    return Verdict(f"{bar}: at most {limit:g}", _shown(value), _known(value) <= limit)


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
