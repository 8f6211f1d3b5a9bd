"""Percentiles, throughput and goodput, against a slow plain computation."""

from __future__ import annotations

import random
from fractions import Fraction
from math import floor

import pytest
from support.load_results import answered, ended, requests

from sluice.loadtest.report.summary import PERCENTILES, is_good, summarize, window
from sluice.loadtest.workload.fields import Objectives

TIGHT = Objectives(ttft_ms=300.0, tpot_ms=60.0, e2el_ms=700.0)


def plain_percentile(values: list[float], rank: int) -> float:
    """By linear interpolation between the neighbours in order."""
    ordered = sorted(values)
    place = Fraction(rank * (len(ordered) - 1), 100)
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + float(place - low) * (ordered[high] - ordered[low])


def test_against_a_plain_computation() -> None:
    sent = requests(137, seed=1)
    found = summarize(sent, TIGHT, window(sent))
    times: dict[str, list[float]] = {"ttft_ms": [], "tpot_ms": [], "itl_ms": [], "e2el_ms": []}
    good, tokens = 0, 0
    for each in sent:
        assert each.first is not None
        assert each.last is not None
        ttft, latency = each.first - each.start, each.end - each.start
        times["ttft_ms"].append(1000 * ttft)
        times["e2el_ms"].append(1000 * latency)
        gap = 0.0
        if each.tokens > 1:
            gap = (each.last - each.first) / (each.tokens - 1)
            times["tpot_ms"].append(1000 * gap)
            times["itl_ms"] += [1000 * gap] * (each.tokens - 1)
        good += ttft <= 0.3 and gap <= 0.06 and latency <= 0.7
        tokens += each.tokens
    for name, values in times.items():
        for rank in PERCENTILES:
            wanted = plain_percentile(values, rank)
            assert found.times[name][f"p{rank}"] == pytest.approx(wanted), (name, rank)
    seconds = max(each.end for each in sent) - min(each.start for each in sent)
    assert 0 < good < 137
    assert (found.good, found.tokens, found.answered) == (good, tokens, 137)
    assert found.throughput == pytest.approx(tokens / seconds)
    assert found.goodput == pytest.approx(good / seconds)
    assert found.late_ms == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        (Objectives(ttft_ms=200.0), True),
        (Objectives(ttft_ms=199.0), False),
        (Objectives(tpot_ms=50.0), True),
        (Objectives(tpot_ms=49.0), False),
        (Objectives(e2el_ms=410.0), True),
        (Objectives(e2el_ms=409.0), False),
        (Objectives(ttft_ms=200.0, tpot_ms=49.0), False),
        (Objectives(ttft_ms=200.0, tpot_ms=50.0, e2el_ms=410.0), True),
    ],
)
def test_an_objective_is_kept_up_to_its_limit(objectives: Objectives, good: bool) -> None:
    # Halves and quarters, so that no limit is missed by rounding.
    sent = answered(1024.0, 0.199999, 0.0499999, 5)
    assert is_good(sent, objectives) is good


def test_what_was_not_answered_is_not_good() -> None:
    for ending in ("refused", "aborted", "hung", "lost"):
        assert not is_good(ended(0.0, ending, first=0.1, last=0.1), Objectives(ttft_ms=1000.0))


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    found = summarize([answered(10.0, 0.25, 0.0, 1)], Objectives(tpot_ms=1.0), 1.0)
    assert found.times["tpot_ms"] == found.times["itl_ms"] == {}
    assert found.good == 1


def test_every_ending_is_counted() -> None:
    sent = [
        answered(0.0, 0.1, 0.1, 3),
        ended(0.0, "refused", status=503, retry_after=True),
        ended(0.0, "refused", status=503, retry_after=True),
        ended(0.0, "refused", status=503),
        ended(0.0, "refused", status=400),
        ended(0.0, "aborted", status=200, tokens=4),
        ended(0.0, "hung"),
        ended(0.0, "lost"),
    ]
    found = summarize(sent, TIGHT, 2.0)
    assert found.endings == {
        "answered": 1,
        "503 with Retry-After": 2,
        "503 without Retry-After": 1,
        "400 without Retry-After": 1,
        "aborted": 1,
        "hung": 1,
        "lost": 1,
    }
    assert sum(found.endings.values()) == found.requests
    assert found.throughput == (3 + 4) / 2


def test_the_percentiles() -> None:
    assert PERCENTILES == (50, 90, 95, 99)


def test_nothing_sent() -> None:
    found = summarize([], TIGHT, window([]))
    assert (found.requests, found.times, found.throughput, found.goodput) == (0, {}, 0, 0)


def test_order_does_not_matter() -> None:
    sent = list(requests(40, seed=2))
    first = summarize(sent, TIGHT, window(sent))
    random.Random(0).shuffle(sent)
    assert summarize(sent, TIGHT, window(sent)) == first
