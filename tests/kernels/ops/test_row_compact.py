"""Compaction of pairs and its inverse, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.poison import poisoned_memory

from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON
from sluice.kernels.ops.row_compact import row_compact, row_scatter

Pair = tuple[torch.Tensor, torch.Tensor]

GRID = [
    pytest.param(1, 5, [0], id="one token"),
    pytest.param(7, 5, [], id="no rows"),
    pytest.param(7, 1, [6], id="last row only, one column"),
    pytest.param(7, 5, list(range(7)), id="all rows"),
    pytest.param(13, 11, [0, 2, 3, 5, 7, 11], id="prime sizes"),
    pytest.param(9, 16, [1, 2, 8], id="fewer rows than a tile, columns that fill one"),
    pytest.param(7, 1030, [0, 1, 3, 4, 6], id="several tiles, none of them full"),
    pytest.param(5, 7, [4, 0, 3], id="not in order"),
]
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="unlike halves"),
]
implementations = pytest.mark.parametrize("choice", [AUTO, REFERENCE, TRITON])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def column_major(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def every_other_row(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((2 * len(tensor) + 1, tensor.shape[1]), 77.0, dtype=tensor.dtype)
    wide[1::2] = tensor
    return wide[1::2]


def part_of_wider_rows(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((len(tensor), tensor.shape[1] + 3), 77.0, dtype=tensor.dtype)
    wide[:, 2:-1] = tensor
    return wide[:, 2:-1]


LAYOUTS = [contiguous, column_major, every_other_row, part_of_wider_rows]


def bits(tensor: torch.Tensor) -> list[list[int]]:
    """What is stored: NaN is itself here, and zeros have signs."""
    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    result: list[list[int]] = tensor.contiguous().view(whole).tolist()
    return result


def make_pair(tokens: int, hidden: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Pair:
    generator = torch.Generator().manual_seed(tokens * 100 + hidden)
    delta, residual = torch.randn(2, tokens, hidden, generator=generator)
    delta[0, 0], residual[-1, 0], residual[0, -1] = torch.inf, torch.nan, -0.0
    return delta.to(dtypes[0]), residual.to(dtypes[1])


@implementations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "hidden", "chosen"), GRID)
def test_layouts(
    choice: str,
    tokens: int,
    hidden: int,
    chosen: list[int],
    layout: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    check(choice, make_pair(tokens, hidden, (torch.float32, torch.float32)), chosen, layout)


@implementations
@pytest.mark.parametrize(("first", "second"), DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "chosen"), GRID)
def test_dtypes(
    choice: str,
    tokens: int,
    hidden: int,
    chosen: list[int],
    first: torch.dtype,
    second: torch.dtype,
) -> None:
    check(choice, make_pair(tokens, hidden, (first, second)), chosen, contiguous)


def check(
    choice: str,
    pair: Pair,
    chosen: list[int],
    layout: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Out, changed, and back."""
    compact = row_compact.implementation("cpu", choice)
    scatter = row_scatter.implementation("cpu", choice)
    before = [bits(half) for half in pair]
    delta, residual = (layout(half) for half in pair)
    index = torch.tensor(chosen, dtype=torch.int64)
    packed = compact(delta, residual, index)
    for half, rows, old in zip((delta, residual), packed, before, strict=True):
        assert rows.shape == (len(chosen), half.shape[1])
        assert rows.dtype == half.dtype
        assert rows.is_contiguous()
        assert bits(rows) == [old[row] for row in chosen]
    for rows in packed:
        rows += 1
    assert [bits(delta), bits(residual)] == before, "compaction must copy"
    after = [bits(rows) for rows in packed]
    scatter(delta, residual, index, layout(packed[0]), layout(packed[1]))
    for half, old, new in zip((delta, residual), before, after, strict=True):
        expected = [list(row) for row in old]
        for row, changed in zip(chosen, new, strict=True):
            expected[row] = changed
        assert bits(half) == expected


@implementations
def test_halves_that_lie_in_memory_unlike_each_other(choice: str) -> None:
    pair = make_pair(7, 1030, (torch.float32, torch.float32))
    delta, residual = column_major(pair[0]), every_other_row(pair[1])
    index = torch.tensor([1, 2, 6])
    packed = row_compact.implementation("cpu", choice)(delta, residual, index)
    expected = [half[[1, 2, 6]] for half in pair]
    assert [bits(rows) for rows in packed] == [bits(rows) for rows in expected]
    back = part_of_wider_rows(expected[1]), column_major(expected[0])
    row_scatter.implementation("cpu", choice)(delta, residual, index, *back)
    for half, old, other in zip((delta, residual), pair, expected[::-1], strict=True):
        assert bits(half[[1, 2, 6]]) == bits(other)
        assert bits(half[[0, 3, 4, 5]]) == bits(old[[0, 3, 4, 5]])


@implementations
def test_the_halves_do_not_mix(choice: str) -> None:
    delta, residual = torch.zeros(4, 3), torch.ones(4, 3)
    index = torch.tensor([1, 3])
    rows = row_compact.implementation("cpu", choice)(delta, residual, index)
    assert [half.unique().tolist() for half in rows] == [[0.0], [1.0]]
    scatter = row_scatter.implementation("cpu", choice)
    scatter(delta, residual, index, torch.full((2, 3), 5.0), torch.full((2, 3), 6.0))
    assert delta[:, 0].tolist() == [0.0, 5.0, 0.0, 5.0]
    assert residual[:, 0].tolist() == [1.0, 6.0, 1.0, 6.0]


@implementations
def test_what_lies_between_the_rows_is_left_alone(choice: str) -> None:
    wide = torch.full((2, 9, 8), 77.0)
    delta, residual = wide[:, 1::2, 2:-1]
    scatter = row_scatter.implementation("cpu", choice)
    scatter(delta, residual, torch.tensor([0, 3]), torch.zeros(2, 5), torch.ones(2, 5))
    expected = torch.full((2, 9, 8), 77.0)
    expected[0, [1, 7], 2:-1], expected[1, [1, 7], 2:-1] = 0.0, 1.0
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("chosen", [[0, 2], []], ids=["rows", "no rows"])
def test_operators(chosen: list[int]) -> None:
    delta, residual = torch.randn(2, 4, 3)
    index = torch.tensor(chosen, dtype=torch.int64)
    rows = torch.randn(2, len(chosen), 3)
    torch.library.opcheck(row_compact.op.default, (delta, residual, index))
    torch.library.opcheck(row_scatter.op.default, (delta, residual, index, rows[0], rows[1]))
