"""What the table of kernel times takes for right, and that it refuses to time anything else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from sluice.kernels.bench import measure as measuring
from sluice.kernels.bench.agreement import MismatchError, assert_same, routes, within
from sluice.kernels.bench.cases.case import Call, Case, Counterpart
from sluice.kernels.bench.cases.catalogue import OPERATIONS
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.bench.clock import CpuClock
from sluice.kernels.bench.measure import COPY, OURS, REFERENCE, measure, served
from sluice.kernels.dispatch import TRITON
from sluice.kernels.ops.row_compact import row_compact

CPU = torch.device("cpu")
TINY = replace(Shapes.for_device("cpu"), vocabulary=61, hidden=24, head_size=8)
BY_NAME = {entry.name: entry for entry in OPERATIONS}


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_cpu_gets_is_right_and_is_timed(name: str, rows: int) -> None:
    for case in BY_NAME[name].cases(TINY, rows):
        ours = served(case, CPU)
        result = measure(case, CpuClock(), 5, CPU, ours)
        assert not result.wrong
        others = {other.name for other in case.counterparts}
        own = set() if ours is case.operation.reference else {OURS}
        assert result.seconds.keys() == {REFERENCE, COPY} | own | others
        assert {len(sample.values) for sample in result.seconds.values()} == {5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_gpu_gets_is_right(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: the checks of a run on a GPU, less its times."""

    def untimed(calls: Mapping[str, Call], repeats: int, clock: Any) -> dict[str, list[float]]:
        return {name: [1.0] * repeats for name in calls}

    monkeypatch.setattr(measuring, "interleaved", untimed)
    for case in BY_NAME[name].cases(replace(TINY, dtype=dtype), 5):
        ours = case.operation.implementation("cpu", TRITON)
        assert not measure(case, CpuClock(), 5, CPU, ours).wrong


def compaction() -> Case:
    (case,) = BY_NAME["row_compact"].cases(TINY, 5)
    return case


def off_by_one(delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor) -> Any:
    return row_compact.reference(delta, residual, (index + 1) % len(delta))


def not_a_number(delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor) -> Any:
    one, other = row_compact.reference(delta, residual, index)
    return one, other.fill_(math.nan)


def half_of_it(delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor) -> Any:
    return row_compact.reference(delta, residual, index)[:1]


def raising(delta: torch.Tensor, residual: torch.Tensor, index: torch.Tensor) -> Any:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        pytest.param(off_by_one, "output 0: .* of 120 differ", id="other rows"),
        pytest.param(not_a_number, "output 1: NaN", id="not a number"),
        pytest.param(half_of_it, "1 outputs for 2", id="an output is missing"),
        pytest.param(raising, "RuntimeError: no such kernel", id="an exception"),
    ],
)
def test_what_is_wrong_is_not_timed(wrong: Callable[..., Any], why: str) -> None:
    called = 0

    def counted(*args: torch.Tensor) -> Any:
        nonlocal called
        called += 1
        return wrong(*args)

    result = measure(compaction(), CpuClock(), 5, CPU, counted)
    assert called == 1, "checked once and never timed"
    assert result.wrong.keys() == {OURS}
    assert re.match(why, result.wrong[OURS])
    assert result.seconds.keys() == {REFERENCE, COPY}
    assert result.ours is None


def test_a_wrong_counterpart_is_not_timed_and_the_rest_is() -> None:
    case = compaction()
    good = Counterpart("good", lambda: row_compact.reference(*case.args))
    bad = Counterpart("bad", lambda: off_by_one(*case.args))
    none = Counterpart("none", lambda: None)
    result = measure(
        replace(case, counterparts=(bad, good, none)), CpuClock(), 5, CPU, row_compact.reference
    )
    assert result.counterparts == ("good",)
    assert result.wrong.keys() == {"bad", "none"}
    assert result.ours is not None


def test_what_is_written_to_belongs_to_each_implementation() -> None:
    """One that writes nothing must not be taken for right because another has written."""
    (case,) = BY_NAME["count_selections"].cases(TINY, 5)
    result = measure(case, CpuClock(), 5, CPU, lambda *args: None)
    assert "differ" in result.wrong[OURS]
    assert not any(bool(counts.any()) for counts in case.args[2].tensors)


def test_infinities_are_equal_and_nan_is_not() -> None:
    held = torch.tensor([1.0, math.inf, -math.inf])
    assert_same("x", held, held.clone())
    for place, value in ((1, -math.inf), (1, 3e38), (2, math.nan), (0, 1.001)):
        other = held.clone()
        other[place] = value
        with pytest.raises(MismatchError):
            assert_same("x", other, held)
        with pytest.raises(MismatchError):
            assert_same("x", held, other)
    broken = torch.tensor([math.nan])
    with pytest.raises(MismatchError, match="NaN"):
        assert_same("x", broken, broken.clone())


def test_shapes_and_dtypes_are_compared() -> None:
    ones = torch.ones(2, 3)
    for other in (ones[:, :2], ones.double(), ones.bfloat16(), ones[0]):
        with pytest.raises(MismatchError):
            assert_same("x", other, ones)
    with pytest.raises(MismatchError):
        within()((), (ones,))
    with pytest.raises(MismatchError, match=r"1 of 2 differ, by up to 4"):
        assert_same("x", torch.tensor([1, 7]), torch.tensor([1, 3]))


CHOICE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.4, 0.25, 0.25, 0.1]] * 20)[:-1]
CLEAR = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 39)
WEIGHTS = torch.tensor([[0.6, 0.4]] * 39)
IDS = torch.tensor([[0, 1]] * 39, dtype=torch.int32)


def test_slots_may_come_in_any_order_and_unused_ones_in_any_way() -> None:
    agree = routes(CLEAR)
    agree((WEIGHTS.flip(1), IDS.flip(1)), (WEIGHTS, IDS))
    for unused in (-1, 0):
        wide = torch.nn.functional.pad(IDS, (0, 1), value=unused)
        agree((torch.nn.functional.pad(WEIGHTS, (0, 1)), wide), (WEIGHTS, IDS))


def test_wrong_routes() -> None:
    agree = routes(CLEAR)
    other, twice, none = IDS.clone(), IDS.clone(), IDS.clone()
    other[7, 1], twice[7, 1], none[7, 1] = 2, 0, -1
    for ids in (other, twice, none):
        with pytest.raises(MismatchError):
            agree((WEIGHTS, ids), (WEIGHTS, IDS))
    for value in (0.4001, math.nan, 0.0, -0.4):
        weights = WEIGHTS.clone()
        weights[7, 1] = value
        with pytest.raises(MismatchError):
            agree((weights, IDS), (WEIGHTS, IDS))


def test_an_expert_that_runs_twice_at_half_its_weight_is_wrong() -> None:
    ids = torch.cat([IDS, IDS[:, 1:]], dim=1)
    halves = torch.tensor([0.6, 0.2, 0.2]).expand(39, 3)
    with pytest.raises(MismatchError, match="runs twice"):
        routes(CLEAR)((halves, ids), (WEIGHTS, IDS))


def test_either_of_a_tie_may_be_selected() -> None:
    choice = CLEAR.clone()
    choice[7, 2] = choice[7, 1]
    ids = IDS.clone()
    ids[7, 1] = 2
    routes(choice)((WEIGHTS, ids), (WEIGHTS, IDS))
    ids[8, 1] = 2
    with pytest.raises(MismatchError, match="experts"):
        routes(choice)((WEIGHTS, ids), (WEIGHTS, IDS))


def test_rows_with_nothing_but_ties_are_no_check() -> None:
    with pytest.raises(MismatchError, match="19 of 39 rows have ties"):
        routes(CHOICE)((WEIGHTS, IDS), (WEIGHTS, IDS))


def test_counts_of_routes() -> None:
    counts = torch.tensor([[39, 39, 0, 0, 39, 0]])
    ran = torch.tensor([[2, 0, 1]] * 39)
    expected = (WEIGHTS, IDS, counts, ran)
    routes(CLEAR)((WEIGHTS, IDS, counts.clone(), ran.clone()), expected)
    routes(CLEAR)((WEIGHTS, IDS), expected)
    with pytest.raises(MismatchError, match="histogram"):
        routes(CLEAR)((WEIGHTS, IDS, counts + 1, ran), expected)
    with pytest.raises(MismatchError, match="by_token"):
        routes(CLEAR)((WEIGHTS, IDS, counts, ran + 1), expected)
