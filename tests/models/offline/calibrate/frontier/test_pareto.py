"""Intervals, the Pareto set and the presets, against slow definitions."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sluice.models.offline.calibrate.frontier import pareto
from sluice.models.offline.calibrate.frontier.pareto import (
    ALLOWED_LOSS,
    Allowance,
    on_frontier,
)
from sluice.models.offline.intervals import LEAST_REPEATS, median_interval, share_interval
from sluice.models.profile.frontier_fields import FrontierPoint, TokenMeasures
from sluice.models.profile.values import Interval

SHARES = st.sampled_from([0.0, 0.2, 0.9, 0.965, 0.97, 0.985, 0.99, 0.995, 1.0])
SPEEDS = st.sampled_from([0.5, 0.99, 1.0, 1.01, 1.2, 1.5, 2.0])
WIDTHS = st.sampled_from([0.0, 0.01, 0.1, 0.5])
TRIPLES = st.tuples(SHARES, SPEEDS, SHARES)


def point(name: str, quality: float, speed: float, compute: float, width: float) -> FrontierPoint:
    return FrontierPoint(
        name=name,
        routing={},
        quality=Interval(value=quality, low=quality, high=quality),
        speed=Interval(value=speed, low=speed - width, high=speed + width),
        compute_fraction=compute,
        generated_fraction=compute,
        on_frontier=False,
        faster=0.0 if speed - width > 1 else 0.5,
    )


def choose(points: list[FrontierPoint]) -> dict[str, str]:
    return pareto.choose(points, Allowance(points[0], None))


def shortfalls(points: list[FrontierPoint], presets: dict[str, str]) -> list[str]:
    return [*pareto.shortfalls(points, presets, Allowance(points[0], None))]


def agreeing(point: FrontierPoint, agreement: float) -> FrontierPoint:
    return point.model_copy(update={"tokens": tokens(agreement)})


def tokens(agreement: float) -> TokenMeasures:
    found = Interval(value=agreement, low=agreement, high=agreement)
    return TokenMeasures(agreement=found, divergence=0.1, perplexity=2.0)


@st.composite
def points(draw: st.DrawFn) -> list[FrontierPoint]:
    rows = draw(st.lists(st.tuples(TRIPLES, WIDTHS), min_size=1, max_size=8))
    return [point(str(i), *triple, width) for i, (triple, width) in enumerate(rows)]


@given(st.lists(TRIPLES, min_size=1, max_size=12))
def test_the_frontier_is_what_no_other_point_beats(triples: list[tuple[float, ...]]) -> None:
    found = on_frontier(triples)
    for own, (quality, speed, compute) in enumerate(triples):
        beaten = False
        for q, s, c in triples:
            as_good = q >= quality and s >= speed and c <= compute
            better = q > quality or s > speed or c < compute
            beaten = beaten or (as_good and better)
        assert found[own] is not beaten
    assert any(found)


@settings(max_examples=500)
@given(points())
def test_presets_are_the_cheapest_points_allowed(drawn: list[FrontierPoint]) -> None:
    by_name = {each.name: each for each in drawn}
    frontier = on_frontier([(p.quality.value, p.speed.value, p.compute_fraction) for p in drawn])
    best = [p for p, kept in zip(drawn, frontier, strict=True) if kept]
    found = choose(drawn)
    assert len({*found.values()}) == len(found)
    for number, preset in enumerate(ALLOWED_LOSS):
        least = drawn[0].quality.value - ALLOWED_LOSS[preset]
        allowed = [p for p in best if p.speed.low > 1 and p.quality.value > least - 1e-6]
        if preset not in found:
            stricter = [found[name] for name in [*ALLOWED_LOSS][:number] if name in found]
            assert not allowed or {p.name for p in allowed} & {*stricter}
            continue
        chosen = by_name[found[preset]]
        assert chosen in allowed
        fastest = max(allowed, key=lambda p: p.speed.value)
        assert chosen.speed.value >= fastest.speed.low
        for other in allowed:
            if other.speed.value < fastest.speed.low:
                continue
            if preset == "quality":
                assert chosen.quality.value >= other.quality.value
            else:
                assert chosen.compute_fraction <= other.compute_fraction


def test_presets_by_example() -> None:
    full = point("full", 0.98, 1.0, 1.0, 0.02)
    lossless = point("lossless", 0.975, 1.1, 0.9, 0.02)
    small = point("small", 0.97, 1.3, 0.8, 0.02)
    large = point("large", 0.95, 1.6, 0.6, 0.02)
    # As fast as `large` as far as can be told, and less work.
    lean = point("lean", 0.951, 1.58, 0.55, 0.02)
    broken = point("broken", 0.9, 3.0, 0.1, 0.02)
    chosen = choose([full, lossless, small, large, lean, broken])
    assert chosen == {"quality": "lossless", "balanced": "small", "fast": "lean"}


def test_a_clear_lead_in_speed_decides_over_compute() -> None:
    full = point("full", 1.0, 1.0, 1.0, 0.02)
    fast, lean = point("fast", 1.0, 1.6, 0.6, 0.02), point("lean", 1.0, 1.5, 0.5, 0.02)
    assert set(choose([full, fast, lean]).values()) == {"fast"}


def test_of_equally_fast_points_quality_takes_the_best() -> None:
    full = point("full", 1.0, 1.0, 1.0, 0.02)
    same, lean = point("same", 1.0, 1.55, 0.6, 0.2), point("lean", 0.996, 1.6, 0.5, 0.2)
    # `fast` would be `lean` too, and is left out.
    assert choose([full, same, lean]) == {"quality": "same", "balanced": "lean"}


@pytest.mark.parametrize(("faster", "name"), [(0.05, ["skip"]), (0.051, []), (None, [])])
def test_a_gain_that_is_not_shown_is_no_preset(faster: float | None, name: list[str]) -> None:
    """However large the median is."""
    full = point("full", 1.0, 1.0, 1.0, 0.02)
    skip = point("skip", 1.0, 3.0, 0.5, 2.5).model_copy(update={"faster": faster})
    chosen = choose([full, skip])
    assert [*chosen.values()] == name
    said = "no setting is shown to be faster than full depth, and there are no presets"
    assert (said in shortfalls([full, skip], chosen)) is (name == [])


def test_a_loss_that_the_items_leave_open_is_said() -> None:
    full, skip = point("full", 0.98, 1.0, 1.0, 0.02), point("skip", 0.98, 1.5, 0.5, 0.02)
    skip = skip.model_copy(update={"quality": share_interval(0.98, 100)})
    chosen = choose([full, skip])
    assert {*chosen.values()} == {"skip"}
    assert shortfalls([full, skip], chosen) == [
        "preset 'quality' loses at most 0.5 points of quality as measured; the items leave it "
        "open to lose 5.0"
    ]


def test_no_presets_where_nothing_is_good_enough() -> None:
    full, poor = point("full", 1.0, 1.0, 1.0, 0.0), point("poor", 0.9, 2.0, 0.5, 0.0)
    assert choose([full, poor]) == {}
    said = "every setting that is shown to be faster loses too much, and there are no presets"
    assert shortfalls([full, poor], {}) == [said]


def test_tasks_that_show_no_loss_do_not_make_a_preset_of_other_tokens() -> None:
    """Choices are often right although most of the tokens differ."""
    full = agreeing(point("full", 0.6, 1.0, 1.0, 0.02), 1.0)
    few = agreeing(point("few", 0.61, 1.2, 0.9, 0.02), 0.94)
    many = agreeing(point("many", 0.62, 1.5, 0.7, 0.02), 0.7)
    allowance = Allowance(full, tokens(0.97))
    assert pareto.choose([full, few, many], allowance) == {"balanced": "few"}
    # Full depth agrees with itself in 97 of 100 tokens: a presets may lose from there on.
    assert allowance.floor == 0.97
    assert pareto.choose([full, few, many], Allowance(full, tokens(0.9))) == {"quality": "few"}
    assert "than full depth's own with itself (97.0 %)" in str(allowance)


def test_without_tasks_tokens_alone_choose() -> None:
    full = agreeing(point("full", 1.0, 1.0, 1.0, 0.02), 1.0)
    few = agreeing(point("few", 0.92, 1.2, 0.9, 0.02), 0.92)
    assert pareto.choose([full, few], Allowance(full, None)) == {}
    alone = Allowance.of([full, few], None, "token agreement")
    assert pareto.choose([full, few], alone) == {"fast": "few"}
    assert [*pareto.shortfalls([full, few], {"fast": "few"}, alone)] == []
    assert "tasks" not in str(alone)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson(counted: tuple[int, int]) -> None:
    right, items = counted
    found = share_interval(right / items, items)
    expected = binomtest(right, items).proportion_ci(0.95, method="wilson")
    assert math.isclose(found.low, expected.low, abs_tol=1e-9)
    assert math.isclose(found.high, expected.high, abs_tol=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("count", [6, 7, 9, 12, 25])
def test_the_interval_of_a_median_holds_it_often_enough(count: int) -> None:
    rng = random.Random(count)
    held = narrower = 0
    for _ in range(2000):
        values = [rng.expovariate(1.0) for _ in range(count)]
        found = median_interval(values)
        assert found.value == statistics.median(values)
        held += found.low <= math.log(2) <= found.high
        inside = sorted(v for v in values if found.low < v < found.high)
        narrower += bool(inside) and inside[0] <= math.log(2) <= inside[-1]
    assert held / 2000 > 0.94
    # The next pair inwards would be too narrow.
    assert narrower / 2000 < 0.95


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="6 are needed"):
        median_interval([1.0] * (LEAST_REPEATS - 1))
    assert median_interval([1.0] * LEAST_REPEATS).low == 1.0
