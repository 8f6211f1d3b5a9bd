"""Statistics and decisions of an exit against their definition in double precision."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.poison import poisoned_memory

from sluice.kernels.dispatch import CHOICES
from sluice.kernels.ops.exit_decision import (
    CONFIDENCE,
    ENTROPY,
    FIRST,
    LOG_SUM,
    SECOND,
    SPREAD,
    exit_decision,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OUT = -math.inf
NEAR = 1e-5
GRID = [
    pytest.param(1, 1, id="one row, one token"),
    pytest.param(2, 2, id="no third token"),
    pytest.param(0, 5, id="no rows"),
    pytest.param(5, 13, id="prime sizes, rows shorter than a block"),
    pytest.param(17, 64, id="one row more than a program has"),
    pytest.param(3, 1024, id="rows of exactly a block"),
    pytest.param(2, 1025, id="one token more than a block"),
    pytest.param(2, 4096, id="rows of exactly a part"),
    pytest.param(2, 4097, id="a part of one token"),
    pytest.param(1, 9001, id="several parts"),
]
POOL = (OUT, OUT, -3e38, -1e4, -3.0, 0.0, 0.5, 0.5, 0.5001, 7.0, 88.0, 1e4, 3e38)
"""What can go wrong with infinities, ties, exponentials and sums."""
implementations = pytest.mark.parametrize("choice", CHOICES)
measures = pytest.mark.parametrize("measure", [CONFIDENCE, ENTROPY])


@pytest.fixture(scope="module", autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@dataclass(frozen=True)
class Exit:
    """The definition, for one row with at least one live token."""

    first: float
    second: float
    log_sum: float
    entropy: float
    lead: float

    @classmethod
    def of(cls, row: list[float]) -> Exit:
        first, second = [*sorted(row, reverse=True), OUT][:2]
        # Relative to the largest: beside 3e38 the logarithm of a sum would be lost.
        raised = [math.exp(x - first) for x in row]
        total = math.fsum(raised)
        shares = [x / total for x in raised if x > 0]
        entropy = -math.fsum(p * math.log(p) for p in shares)
        lead = (1.0 - math.exp(second - first)) / total
        log_sum = first + math.log(total)
        return cls(first, second, log_sum, entropy, lead)

    def leaves(self, measure: int, threshold: float) -> bool | None:
        """None if rounding may decide."""
        value = self.lead if measure == CONFIDENCE else self.entropy
        if abs(value - threshold) < NEAR:
            return None
        return value >= threshold if measure == CONFIDENCE else value <= threshold


def run(
    choice: str, logits: torch.Tensor, thresholds: torch.Tensor, measure: int
) -> tuple[torch.Tensor, torch.Tensor]:
    before = logits.clone()
    stats, leaves = exit_decision.implementation("cpu", choice)(logits, thresholds, measure)
    assert stats.dtype == torch.float32
    assert stats.shape == (len(logits), 4)
    assert stats.is_contiguous()
    assert leaves.dtype == torch.bool
    assert leaves.shape == (len(logits),)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return stats, leaves


def assert_as_defined(
    stats: torch.Tensor,
    leaves: torch.Tensor,
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    measure: int,
) -> None:
    vocabulary = logits.shape[1]
    for row, left, values, threshold in zip(
        stats.tolist(), leaves.tolist(), logits.double().tolist(), thresholds.tolist(), strict=True
    ):
        exact = Exit.of(values)
        assert (row[FIRST], row[SECOND]) == (exact.first, exact.second)
        assert row[LOG_SUM] >= row[FIRST]
        assert 0.0 <= row[SPREAD] <= math.log(vocabulary) + NEAR
        assert row[LOG_SUM] == pytest.approx(exact.log_sum, rel=1e-6, abs=1e-6)
        assert row[SPREAD] == pytest.approx(exact.entropy, rel=2e-6, abs=2e-6)
        expected = exact.leaves(measure, threshold)
        assert expected is None or left == expected


def drawn(rows: int, vocabulary: int, seed: int = 1, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, vocabulary, generator=generator)


@implementations
@measures
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("rows", "vocabulary"), GRID)
def test_definition(
    choice: str, rows: int, vocabulary: int, dtype: torch.dtype, measure: int
) -> None:
    logits = drawn(rows, vocabulary).to(dtype)
    # Above and below what random rows have.
    thresholds = torch.tensor([0.1, 1.5, 0.7] * rows)[:rows]
    assert_as_defined(*run(choice, logits, thresholds, measure), logits, thresholds, measure)


@st.composite
def corners(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from the pool, each with a live token, and thresholds."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows, vocabulary = rng.randint(1, 4), rng.randint(1, 9)
    logits = torch.tensor([rng.choices(POOL, k=vocabulary) for _ in range(rows)])
    for row in logits:
        row[rng.randrange(vocabulary)] = rng.choice(POOL[2:])
    return logits, torch.tensor(rng.choices([0.0, 0.2, 0.5, 0.9, 1.0, 2.0], k=rows))


@implementations
@measures
@settings(max_examples=80, deadline=None)
@given(corner=corners())
def test_corners(choice: str, measure: int, corner: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert_as_defined(*run(choice, *corner, measure), *corner, measure)


@implementations
@pytest.mark.parametrize("vocabulary", [1, 13, 4097])
def test_one_live_token_is_certain(choice: str, vocabulary: int) -> None:
    """All others ruled out: probability 1 and entropy 0, exactly, wherever the token is."""
    for place in {0, vocabulary // 2, vocabulary - 1}:
        logits = torch.full((1, vocabulary), OUT)
        logits[0, place] = -2.5
        stats, sure = run(choice, logits, torch.ones(1), CONFIDENCE)
        _, narrow = run(choice, logits, torch.zeros(1), ENTROPY)
        assert stats.tolist() == [[-2.5, OUT, -2.5, 0.0]]
        assert sure.tolist() == narrow.tolist() == [True]


@implementations
@pytest.mark.parametrize("places", [(0, 1), (3, 1027), (5, 4096), (4095, 4099), (4097, 4098)])
def test_the_second_of_equals_is_the_first(choice: str, places: tuple[int, int]) -> None:
    """Next to each other, in one lane, and in different parts."""
    logits = drawn(2, 4100)
    logits[0, list(places)] = 50.0
    stats, leaves = run(choice, logits, torch.zeros(2), CONFIDENCE)
    assert stats[0, [FIRST, SECOND]].tolist() == [50.0, 50.0]
    assert leaves.tolist() == [True, True]
    # A lead of exactly nothing.
    _, leaves = run(choice, logits, torch.full((2,), 1e-9), CONFIDENCE)
    assert leaves.tolist() == [False, True]


@implementations
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_in_order(choice: str, order: str) -> None:
    """Every token the largest so far, and none."""
    logits = torch.linspace(-60.0, 30.0, 4500).unsqueeze(0)
    logits = logits if order == "rising" else logits.flip(-1)
    thresholds = torch.tensor([4.0])
    assert_as_defined(*run(choice, logits, thresholds, ENTROPY), logits, thresholds, ENTROPY)


@implementations
def test_all_tokens_alike(choice: str) -> None:
    logits = torch.full((2, 5000), 3.0)
    logits[1] = -3e4
    stats, leaves = run(choice, logits, torch.full((2,), 9.0), ENTROPY)
    assert stats[:, SPREAD].tolist() == pytest.approx([math.log(5000)] * 2, rel=1e-6)
    assert leaves.tolist() == [True, True]


@implementations
@measures
@pytest.mark.parametrize("vocabulary", [13, 1025])
def test_rows_do_not_depend_on_each_other(choice: str, measure: int, vocabulary: int) -> None:
    logits, thresholds = drawn(18, vocabulary), torch.linspace(0.0, 2.0, 18)
    stats, leaves = run(choice, logits, thresholds, measure)
    assert 0 < int(leaves.sum()) < 18
    for row in range(18):
        own = slice(row, row + 1)
        alone, left = run(choice, logits[own], thresholds[own], measure)
        assert torch.equal(alone[0], stats[row])
        assert torch.equal(left[0], leaves[row])


@implementations
@measures
def test_logits_may_be_strided(choice: str, measure: int) -> None:
    """A vocabulary that is padded, a transposed one, and thresholds out of a table."""
    logits, thresholds = drawn(6, 70), torch.linspace(0.0, 2.0, 6)
    plain = run(choice, logits, thresholds, measure)
    wide = torch.full((6, 90), math.nan)
    wide[:, :70] = logits
    for strided in (wide[:, :70], logits.t().contiguous().t()):
        assert not strided.is_contiguous()
        stats, leaves = run(choice, strided, torch.stack((thresholds,) * 3, 1)[:, 1], measure)
        torch.testing.assert_close(stats, plain[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(leaves, plain[1])


@implementations
@measures
@pytest.mark.parametrize("place", [0, 4096])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_stays_and_shows(choice: str, measure: int, place: int, value: float) -> None:
    logits, thresholds = drawn(3, 4097), torch.tensor([0.0, 0.0, 0.0])
    if measure == ENTROPY:
        thresholds += 100.0
    sound, leaves = run(choice, logits, thresholds, measure)
    assert leaves.tolist() == [True] * 3
    logits[1, place] = value
    stats, leaves = run(choice, logits, thresholds, measure)
    assert bool(stats[1].isnan().all())
    assert leaves.tolist() == [True, False, True]
    assert torch.equal(stats[[0, 2]], sound[[0, 2]])


@implementations
@measures
@pytest.mark.parametrize("vocabulary", [1, 7, 4097])
def test_a_row_without_any_token_stays(choice: str, measure: int, vocabulary: int) -> None:
    logits = torch.full((1, vocabulary), OUT)
    thresholds = torch.tensor([100.0 if measure == ENTROPY else 0.0])
    stats, leaves = run(choice, logits, thresholds, measure)
    assert stats[0, [FIRST, SECOND, LOG_SUM]].tolist() == [OUT] * 3
    assert bool(stats[0, SPREAD].isnan())
    assert leaves.tolist() == [False]


@measures
def test_a_graph_can_hold_it(measure: int) -> None:
    args = (drawn(3, 20).bfloat16(), torch.tensor([0.1, 0.5, 0.9]), measure)
    torch.library.opcheck(exit_decision.op.default, args)
