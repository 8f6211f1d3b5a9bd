"""Norms and cosines of the residual stream against their definition in double precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support.poison import poisoned_memory

from sluice.kernels.dispatch import CHOICES
from sluice.kernels.ops.layer_stats import CHANGE, COSINE, NORM, SMALLEST, layer_stats

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NOTHING = torch.empty(0)
GRID = [
    pytest.param(1, 1, id="one number"),
    pytest.param(1, 768, id="one token"),
    pytest.param(0, 16, id="no rows"),
    pytest.param(5, 13, id="prime sizes, rows shorter than a block"),
    pytest.param(17, 64, id="one row more than a program has"),
    pytest.param(3, 1024, id="rows of exactly a block"),
    pytest.param(2, 1025, id="one number more than a block"),
    pytest.param(2, 2880, id="several blocks, the last not full"),
]
implementations = pytest.mark.parametrize("choice", CHOICES)


@pytest.fixture(scope="module", autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def streams(
    rows: int, hidden: int, dtypes: tuple[torch.dtype, ...] = (FP32, FP32, FP32), seed: int = 1
) -> tuple[torch.Tensor, ...]:
    """A pair, and a stream before it that the pair has not moved far from."""
    generator = torch.Generator().manual_seed(seed)
    delta, residual, noise = torch.randn(3, rows, hidden, generator=generator)
    parts = (0.3 * delta, residual, residual + 0.2 * noise)
    return tuple(part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True))


def run(
    choice: str, delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    given = (delta, residual, before)
    kept = [each.clone() for each in given]
    stats = layer_stats.implementation("cpu", choice)(*given)
    assert stats.dtype == torch.float32
    assert stats.shape == (len(delta), 3)
    assert stats.is_contiguous()
    for one, other in zip(given, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return stats


def assert_as_defined(
    stats: torch.Tensor, delta: torch.Tensor, residual: torch.Tensor, before: torch.Tensor
) -> None:
    after = delta.double() + residual.double() if residual.numel() else delta.double()
    for row, a, b in zip(stats.tolist(), after.tolist(), before.double().tolist(), strict=True):
        length, length_before = math.hypot(*a), math.hypot(*b)
        product = math.fsum(x * y for x, y in zip(a, b, strict=True))
        assert row[NORM] == pytest.approx(length, rel=2e-6)
        near = 2e-6 * (length + length_before)
        assert row[CHANGE] == pytest.approx(length - length_before, rel=0.0, abs=near)
        cosine = product / max(length * length_before, SMALLEST)
        assert row[COSINE] == pytest.approx(cosine, rel=0.0, abs=4e-6)


@implementations
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("rows", "hidden"), GRID)
def test_definition(choice: str, rows: int, hidden: int, dtype: torch.dtype, paired: bool) -> None:
    delta, residual, before = streams(rows, hidden, (dtype,) * 3)
    given = (delta, residual if paired else NOTHING, before)
    assert_as_defined(run(choice, *given), *given)


@implementations
def test_each_stream_has_its_own_dtype(choice: str) -> None:
    given = streams(3, 70, (BF16, FP32, FP16))
    assert_as_defined(run(choice, *given), *given)


@implementations
def test_streams_may_be_strided(choice: str) -> None:
    """A slice of wider rows, a transposed one, and one row for all."""
    delta, residual, before = streams(6, 70)
    wide = torch.full((6, 90), math.nan)
    wide[:, 7:77] = delta
    strided = (wide[:, 7:77], residual.t().contiguous().t(), before[2:3].expand(6, 70))
    assert [each.stride() for each in strided] == [(90, 1), (1, 6), (0, 1)]
    given = (delta, residual, before[2:3].repeat(6, 1))
    assert_as_defined(run(choice, *strided), *given)


@implementations
@pytest.mark.parametrize("hidden", [13, 2880])
def test_what_holds_exactly(choice: str, hidden: int) -> None:
    delta, residual, before = streams(5, hidden)
    stats = run(choice, delta, residual, before)
    assert torch.equal(stats, run(choice, residual, delta, before))
    assert torch.equal(stats, run(choice, delta + residual, NOTHING, before))
    assert torch.equal(stats, run(choice, delta + residual, torch.zeros_like(delta), before))
    back = run(choice, before, NOTHING, delta + residual)
    assert torch.equal(stats[:, CHANGE], -back[:, CHANGE])
    assert torch.equal(stats[:, COSINE], back[:, COSINE])
    doubled = run(choice, 2 * delta, 2 * residual, 2 * before)
    assert torch.equal(doubled, stats * torch.tensor([2.0, 2.0, 1.0]))
    same = run(choice, before, NOTHING, before)
    assert not same[:, CHANGE].any()
    assert same[:, COSINE].tolist() == pytest.approx([1.0] * 5, abs=1e-6)


@implementations
@pytest.mark.parametrize("hidden", [13, 1025])
def test_rows_do_not_depend_on_each_other(choice: str, hidden: int) -> None:
    given = streams(19, hidden)
    together = run(choice, *given)
    for row in range(19):
        alone = run(choice, *(each[row : row + 1] for each in given))
        assert torch.equal(alone[0], together[row])


@implementations
def test_rows_of_zeros_have_a_cosine_of_zero(choice: str) -> None:
    delta, residual, before = streams(3, 20)
    delta[0], residual[0], before[1] = 0.0, 0.0, 0.0
    delta[2], residual[2], before[2] = 0.0, 0.0, 0.0
    stats = run(choice, delta, residual, before)
    assert stats[:, COSINE].tolist() == [0.0, 0.0, 0.0]
    assert stats[2].tolist() == [0.0, 0.0, 0.0]
    assert_as_defined(stats, delta, residual, before)


@implementations
def test_next_to_nothing_counts_as_nothing(choice: str) -> None:
    """Streams too short for a direction: the cosine fades instead of being noise."""
    after = torch.full((1, 4), 1e-8)
    stats = run(choice, after, NOTHING, after)
    assert 0.0 < float(stats[0, COSINE]) < 1e-3
    assert_as_defined(stats, after, NOTHING, after)


@implementations
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sums_are_taken_in_fp32(choice: str, dtype: torch.dtype) -> None:
    # The pair's sum has no bf16 and its square no fp16; nor has a sum of that many ones.
    pair = run(choice, torch.tensor([[2048.0]], dtype=dtype), torch.ones(1, 1, dtype=dtype),
               torch.ones(1, 1, dtype=dtype))  # fmt: skip
    assert pair[0].tolist() == [2049.0, 2048.0, 1.0]
    ones = torch.ones(1, 2304, dtype=dtype)
    assert run(choice, ones, NOTHING, ones)[0].tolist() == pytest.approx([48.0, 0.0, 1.0])


@implementations
def test_nan_and_infinity_stay_in_their_rows(choice: str) -> None:
    given = delta, _, before = streams(4, 1030)
    sound = run(choice, *given)
    delta[0, 1029], before[1, 0], delta[2, 5] = math.nan, math.nan, math.inf
    stats = run(choice, *given)
    assert bool(stats[0].isnan().all())
    assert torch.equal(stats[1, NORM], sound[1, NORM])
    assert bool(stats[1, [CHANGE, COSINE]].isnan().all())
    assert stats[2, [NORM, CHANGE]].tolist() == [math.inf, math.inf]
    assert bool(stats[2, COSINE].isnan())
    assert torch.equal(stats[3], sound[3])


@pytest.mark.parametrize("paired", [True, False], ids=["pair", "sum"])
def test_a_graph_can_hold_it(paired: bool) -> None:
    delta, residual, before = streams(3, 20, (BF16, BF16, BF16))
    given = (delta, residual if paired else NOTHING, before)
    torch.library.opcheck(layer_stats.op.default, given)
