"""What phases come to: ratios between turns, stages, memory, and whether bars were met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.load_results import AFTER, BEFORE, answered, ended, requests, results

from sluice.loadtest.probes.memory import Memory
from sluice.loadtest.probes.metrics import changes, parse
from sluice.loadtest.report.verdict import Verdict, verdicts
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import Phase

ONE = Phase(0, "all", 1.0)


def scenario(**fields: Any) -> Scenario:
    given = {
        "description": "a test",
        "duration": 5,
        "arrivals": {"process": "poisson", "rate": 10},
        "objectives": {"ttft_ms": 300},
        **fields,
    }
    return Scenario.parse(given, "x")


def at_pace(tokens_per_second: float, policy: str = "p") -> tuple[Any, ...]:
    """Ten answers in a row, so that their throughput is this."""
    length = 10 / tokens_per_second
    return tuple(
        replace(answered(100 + i * length, 0.0, 0.0, 10, policy), end=100 + (i + 1) * length)
        for i in range(10)
    )


def test_rows_of_policies_and_of_all() -> None:
    sent = (*requests(10, 1, "a"), *requests(20, 2, "b"))
    rows = results(scenario(), (ONE, sent), (replace(ONE, round=1), requests(5, 3))).rows()
    assert [(row.phase.round, row.policy, row.summary.requests) for row in rows] == [
        (0, "all", 30),
        (0, "a", 10),
        (0, "b", 20),
        (1, "p", 5),
    ]
    # Rates of a policy are over the phase, so that they add up.
    assert rows[0].summary.throughput == pytest.approx(
        rows[1].summary.throughput + rows[2].summary.throughput
    )


def test_ratios_are_of_the_same_round_whatever_came_first() -> None:
    of_turns = scenario(turns="scraping", scrape_every=1, rounds=3)
    found = results(
        of_turns,
        (Phase(0, "unscraped", 1.0), at_pace(100)),
        (Phase(0, "scraped", 1.0), at_pace(90)),
        (Phase(1, "scraped", 1.0), at_pace(50)),
        (Phase(1, "unscraped", 1.0), at_pace(40)),
        (Phase(2, "unscraped", 1.0), at_pace(20)),
        (Phase(2, "scraped", 1.0), at_pace(20)),
    ).ratios(lambda summary: summary.throughput)
    assert [(each.turn, each.base) for each in found] == [("scraped", "unscraped")]
    assert found[0].values == pytest.approx((0.9, 1.25, 1.0))
    assert found[0].middle == pytest.approx(1.0)


def test_throughput_kept_is_the_last_stage_over_the_best() -> None:
    stages = [(Phase(0, "all", stage), at_pace(pace)) for stage, pace in ((1, 80), (2, 100))]
    ramp = scenario(arrivals={"process": "poisson", "rate": 1, "stages": [1, 2, 3]})
    found = results(ramp, *stages, (Phase(0, "all", 3), at_pace(75)))
    assert found.throughput_kept() == pytest.approx(0.75)


def test_memory_slope() -> None:
    times = np.arange(0.0, 100.0)
    ends = np.arange(0.0, 100.0, 0.1)
    growing = Memory(tuple(times), tuple(500 + 0.02 * times))
    found = growing.slope(ends.tolist(), after=0.0)
    assert found is not None
    # Ten requests a second, 0.02 MB a second: 2 MB per 1,000.
    assert found.mb_per_1000 == pytest.approx(2.0, rel=1e-3)
    assert found.error == pytest.approx(0.0, abs=1e-2)
    assert found.requests == 990
    # What the warm-up took does not count.
    warming = Memory(tuple(times), tuple(np.where(times < 30, 100 + 10 * times, 400)))
    found = warming.slope(ends.tolist(), after=30.0)
    assert found is not None
    assert found.mb_per_1000 == pytest.approx(0.0, abs=1e-9)
    assert growing.slope([], after=0.0) is None
    assert growing.slope(ends.tolist(), after=99.0) is None


def test_memory_slope_error_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(200.0)
    values = 300 + 0.01 * times + rng.normal(0, 0.5, 200)
    ends = times.tolist()
    found = Memory(tuple(times), tuple(values)).slope(ends, after=0.0)
    assert found is not None
    done = (times + 1) / 1000
    (_, slope), covariance = np.polynomial.polynomial.polyfit(done, values, 1), np.cov(done, values)
    assert found.mb_per_1000 == pytest.approx(slope)
    rest = values - values.mean() - slope * (done - done.mean())
    assert found.error**2 == pytest.approx((rest**2).sum() / 198 / (199 * covariance[0, 0]))


def test_changes_of_metrics() -> None:
    found = {str(each.series): each.delta for each in changes(parse(BEFORE), parse(AFTER))}
    assert found == {
        'a_total{kind="<b>y</b>"}': 2,
        'a_total{kind="x"}': 7,
        "seconds_count{}".removesuffix("{}"): 2,
        "seconds_sum": 4.5,
    }
    assert changes(parse(AFTER), parse(AFTER)) == ()


def met(found: list[Verdict]) -> dict[str, bool]:
    return {verdict.bar: verdict.met for verdict in found}


def test_a_clean_run_meets_the_bars_of_every_scenario() -> None:
    sent = (*requests(5, 1), ended(0.0, "refused", status=503, retry_after=True))
    found = verdicts(results(scenario(), (ONE, (*sent, ended(0.0, "aborted")))))
    assert len(found) == 6
    assert all(verdict.met for verdict in found)


@pytest.mark.parametrize(
    ("bad", "bar"),
    [
        (ended(0.0, "hung"), "no request hangs"),
        (ended(0.0, "lost"), "no request is lost"),
        (
            ended(0.0, "refused", status=503),
            "no refusal for load is without Retry-After",
        ),
        (ended(0.0, "refused", status=500), "no other server error"),
    ],
)
def test_one_bad_ending_is_enough(bad: Any, bar: str) -> None:
    found = met(verdicts(results(scenario(), (ONE, (*requests(500, 1), bad)))))
    assert [name for name, good in found.items() if not good] == [bar]


def test_requests_left_running() -> None:
    left = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 1.0}
    found = met(verdicts(results(scenario(), (ONE, requests(5, 1)), left=left)))
    assert not found["nothing is left running or waiting"]


def test_nothing_answered() -> None:
    found = met(verdicts(results(scenario(), (ONE, (ended(0.0, "aborted"),)))))
    assert not found["something was answered"]


def test_bars_of_the_scenario() -> None:
    bars = {
        "throughput_kept": 0.9,
        "scraped_throughput": 0.99,
        "scrape_p99_ms": 25,
        "memory_mb_per_1000": 1,
    }
    arrivals = {"process": "poisson", "rate": 1, "stages": [1, 2]}
    tested = scenario(bars=bars, turns="scraping", scrape_every=1, arrivals=arrivals)
    phases = [
        (Phase(0, turn, stage), at_pace(pace))
        for turn, paces in (("unscraped", (100, 91)), ("scraped", (98, 92)))
        for stage, pace in zip((1.0, 2.0), paces, strict=True)
    ]
    memory = Memory(tuple(np.arange(90.0, 110.0)), (100.0,) * 20)
    found = verdicts(results(tested, *phases, memory=memory))[6:]
    assert [(verdict.found, verdict.met) for verdict in found] == [
        ("0.924", True),  # Median of 91 of 100 and 92 of 98.
        ("0.980", False),
        ("1.011", True),
        ("30.000", False),
        ("0.000", True),
    ]


def test_what_was_not_measured_is_not_met() -> None:
    tested = scenario(bars={"memory_mb_per_1000": 1})
    memory = Memory((), ())
    (found,) = verdicts(results(tested, (ONE, requests(5, 1)), memory=memory))[6:]
    assert (found.found, found.met) == ("not measured", False)
