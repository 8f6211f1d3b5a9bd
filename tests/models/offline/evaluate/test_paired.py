"""Policies on the same items: differences, their intervals, and what could be chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sluice.models.offline.evaluate.paired import differences
from sluice.models.offline.evaluate.results import PolicyResult, Times
from sluice.models.offline.evaluate.score import TaskScore
from sluice.models.offline.intervals import Paired, mcnemar, paired_difference, ratio_of_sums


def result(name: str, right: dict[str, list[bool]], seconds: list[float] | None) -> PolicyResult:
    scores = {task: TaskScore(task, tuple(each)) for task, each in right.items()}
    times = None if seconds is None else Times(tuple(seconds), 10, 2.0)
    return PolicyResult(name, {}, scores, None, times=times)


def test_only_items_that_differ_count() -> None:
    assert Paired.of([True, True, False, False], [True, False, True, True]) == Paired(4, 1, 2)
    with pytest.raises(ValueError, match="longer"):
        Paired.of([True], [True, False])


def test_mcnemar_is_a_toss_per_item_that_differs() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 2**6)


def test_an_interval_of_paired_shares() -> None:
    """Bonett and Price's: (b + 1 - (c + 1)) / (n + 2), with its variance."""
    found = paired_difference([Paired(40, 2, 10)])
    more, less = 3 / 42, 11 / 42
    reach = 1.959964 * math.sqrt((more + less - (more - less) ** 2) / 42)
    assert found.value == -0.2
    assert (found.low, found.high) == pytest.approx((more - less - reach, more - less + reach))


def test_equal_answers_still_leave_doubt() -> None:
    found = paired_difference([Paired(20, 0, 0)])
    assert found.low < -0.08 < found.value == 0.0 < 0.08 < found.high


@pytest.mark.parametrize("counts", [(1, 0), (0, 1), (30, 0), (0, 30), (15, 15)])
def test_the_interval_holds_the_value(counts: tuple[int, int]) -> None:
    found = paired_difference([Paired(30, *counts)])
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth, covered = (0.10 - 0.02 + 0.05 - 0.15) / 2, 0
    for _ in range(2000):
        tasks = []
        for items, gain, loss in ((80, 0.10, 0.02), (40, 0.05, 0.15)):
            gained, lost, _ = rng.multinomial(items, [gain, loss, 1 - gain - loss])
            tasks.append(Paired(items, int(gained), int(lost)))
        found = paired_difference(tasks)
        covered += found.low <= truth <= found.high
    assert 0.94 < covered / 2000 < 0.98


def test_every_task_counts_the_same() -> None:
    found = paired_difference([Paired(100, 0, 10), Paired(10, 5, 0)])
    assert found.value == pytest.approx((-0.1 + 0.5) / 2)


def test_a_ratio_of_times() -> None:
    alike = ratio_of_sums([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (alike.low, alike.value, alike.high) == pytest.approx((2.0, 2.0, 2.0))
    rng = np.random.default_rng(1)
    noisy = ratio_of_sums(rng.uniform(1, 3, 200).tolist(), rng.uniform(1, 3, 200).tolist())
    assert 0.85 < noisy.low < noisy.value < noisy.high < 1.15
    single = ratio_of_sums([3.0], [2.0])
    assert (single.low, single.high) == (1.5, 1.5)


def test_each_policy_is_held_against_the_first() -> None:
    many = [True] * 30
    first = result("none", {"a": many, "b": many}, [2.0] * 60)
    worse = result("half", {"a": [False] * 12 + [True] * 18, "b": many}, [1.0] * 60)
    same = result("same", {"a": many, "b": many}, None)
    lost, kept = differences([first, worse, same])
    assert (lost.reference, lost.gained, lost.lost) == ("none", 0, 12)
    # Of two tests, the smaller p-value counts double.
    assert lost.p_value == pytest.approx(2 * mcnemar(0, 12))
    assert lost.exact_match.value == pytest.approx(-0.2)
    assert lost.faster is not None
    assert lost.faster.value == pytest.approx(2.0)
    assert (kept.p_value, kept.faster) == (1.0, None)
    assert differences([worse, first])[0].gained == 12
    assert differences([first]) == differences([]) == []
    assert lost.to_wire()["faster"]["value"] == pytest.approx(2.0)
    assert kept.to_wire()["faster"] is None
