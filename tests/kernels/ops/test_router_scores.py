"""Scores of every implementation against softmax and sigmoid in double precision, at corners."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support.poison import poisoned_memory
from support.references.routes import Asked
from support.routings import policy_table

from sluice.kernels.dispatch import AUTO, CHOICES, REFERENCE, TRITON
from sluice.kernels.ops.route_topk import route_topk
from sluice.kernels.ops.router_config import EXTRA
from sluice.kernels.ops.router_scores import router_scores
from sluice.kernels.ops.routing_args import (
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)

OUT = -math.inf
NOBODY = torch.zeros((0, 3), dtype=torch.int64)
"""Nothing is counted by token."""
WIDTHS = [
    pytest.param(1, id="one expert"),
    pytest.param(5, id="less than a vector"),
    pytest.param(16, id="whole vectors"),
    pytest.param(61, id="vectors and a rest"),
    pytest.param(128, id="Qwen3's"),
    pytest.param(257, id="more than any model has"),
]
CORNERS = [
    pytest.param([0.0, -0.0, 1e-30], id="next to nothing"),
    pytest.param([88.0, 88.5, -88.5, 0.0], id="exponentials at both ends of fp32"),
    pytest.param([0.0, -86.9, -87.1, -87.5, -95.0, -103.0], id="subnormal shares"),
    pytest.param([0.0, -103.9, -104.1, -150.0, -1e4, -3e38], id="nothing beside the largest"),
    pytest.param([3e38, 3e38, 2e38], id="differences that are large"),
    pytest.param([OUT, 0.5, OUT, -2.0], id="ruled out"),
]
implementations = pytest.mark.parametrize("choice", CHOICES)
scorings = pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])


@pytest.fixture(scope="module", autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def scored(choice: str, logits: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Scores of rows that ask for nothing."""
    rows, experts = logits.shape
    none = torch.empty(0, dtype=torch.int32)
    asked = RouteRows(torch.zeros(rows, dtype=torch.int32), torch.arange(rows), none, none)
    table = policy_table([Asked()], (), RouterSpec(1), experts)
    shared = Shared.nothing(experts, torch.device("cpu"))
    run = router_scores.implementation("cpu", choice)
    spec = RouterSpec(1, "sigmoid" if sigmoid else "softmax")
    scores, selection = run(logits, asked, shared, table, spec)
    assert scores.shape == logits.shape
    assert scores.dtype == torch.float32
    torch.testing.assert_close(selection, scores, rtol=0.0, atol=0.0, equal_nan=True)
    return scores


def exact(logits: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    logits = logits.double()
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def assert_near(scores: torch.Tensor, logits: torch.Tensor, sigmoid: bool) -> None:
    # What logits are below the largest is rounded, and subnormal numbers have fewer bits.
    torch.testing.assert_close(scores.double(), exact(logits, sigmoid), rtol=3e-6, atol=1e-38)


def drawn(rows: int, experts: int, spread: float = 4.0) -> torch.Tensor:
    return spread * torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts))


@implementations
@scorings
@pytest.mark.parametrize("experts", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_definition(choice: str, experts: int, dtype: torch.dtype, sigmoid: bool) -> None:
    logits = drawn(3, experts).to(dtype)
    assert_near(scored(choice, logits, sigmoid), logits, sigmoid)


@implementations
@scorings
@pytest.mark.parametrize("row", CORNERS)
def test_corners(choice: str, row: list[float], sigmoid: bool) -> None:
    """Alone, and as the first of more than a vector, the rest being ruled out."""
    wide = torch.full((1, 37), OUT)
    wide[0, : len(row)] = torch.tensor(row)
    for logits in (torch.tensor([row]), wide):
        assert_near(scored(choice, logits, sigmoid), logits, sigmoid)


@pytest.mark.parametrize("choice", [AUTO, REFERENCE])
def test_shares_too_small_for_a_normal_number_keep_their_order(choice: str) -> None:
    """A mask may leave only these, and the best of them is then selected."""
    logits = torch.full((1, 21), -200.0)
    logits[0, 7] = 0.0
    logits[0, [2, 20, 11]] = torch.tensor([-95.0, -94.0, -93.0])
    scores = scored(choice, logits, sigmoid=False)
    assert scores[0].sort(descending=True).indices[:4].tolist() == [7, 11, 20, 2]
    assert len(scores[0].unique()) == 5


@implementations
@scorings
@pytest.mark.parametrize("experts", [7, 61, 128])
def test_equal_logits_have_equal_scores_wherever_they_are(
    choice: str, experts: int, sigmoid: bool
) -> None:
    """In a vector or in the rest after the last; one bit more would break a tie."""
    for logit in (-3.7, 0.013, 2.9):
        logits = drawn(1, experts)
        logits[0, ::2] = logit
        assert len(scored(choice, logits, sigmoid)[0, ::2].unique()) == 1


# PyTorch's sigmoid does: by a bit, depending on where in a vector of several rows a logit is.
@pytest.mark.parametrize("choice", [AUTO, TRITON])
@scorings
@pytest.mark.parametrize("experts", [5, 61, 128])
def test_rows_do_not_depend_on_each_other(choice: str, experts: int, sigmoid: bool) -> None:
    logits = drawn(9, experts)
    together = scored(choice, logits, sigmoid)
    for row in range(9):
        assert torch.equal(scored(choice, logits[row : row + 1], sigmoid)[0], together[row])


@implementations
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 18, 36])
def test_a_broken_logit_shows_in_all_of_its_row(choice: str, value: float, place: int) -> None:
    """And in no other."""
    logits = drawn(3, 37)
    sound = scored(choice, logits, sigmoid=False)
    logits[1, place] = value
    scores = scored(choice, logits, sigmoid=False)
    assert bool(scores[1].isnan().all())
    assert torch.equal(scores[[0, 2]], sound[[0, 2]])


@implementations
def test_a_row_without_any_expert_is_broken(choice: str) -> None:
    scores = scored(choice, torch.full((2, 19), OUT), sigmoid=False)
    assert bool(scores.isnan().all())


@pytest.mark.parametrize("choice", [AUTO, REFERENCE])
@pytest.mark.parametrize("value", [math.nan, -math.nan])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_broken_row_names_an_expert_that_exists(choice: str, value: float, rows: int) -> None:
    """The kernel of the experts reads memory where an id says."""
    logits = drawn(rows, 21)
    sound = route(choice, logits)
    logits[0, 13] = value
    weights, ids = route(choice, logits)
    assert ids.shape == ((1, 1) if rows == 1 else (2, 4))
    assert 0 <= int(ids.min()) <= int(ids.max()) < 21
    assert not weights[0].any()
    assert ids[1:].tolist() == sound[1][1:].tolist()
    assert weights[1:].tolist() == sound[0][1:].tolist()


def route(choice: str, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of rows with a control that changes nothing."""
    rows, experts = logits.shape
    spec = RouterSpec(4)
    none = torch.empty(0, dtype=torch.int32)
    policies = torch.arange(1, rows + 1, dtype=torch.int32)
    counts = SelectionCounts(torch.zeros((1, experts + EXTRA), dtype=torch.int64), NOBODY)
    device = torch.device("cpu")
    groups = (
        RouteRows(policies, torch.arange(rows), none, none),
        Shared.nothing(experts, device),
        policy_table([Asked(top_k=4)] * rows, (), spec, experts),
        spec,
        Selection.nothing(device),
        counts,
    )
    return route_topk.implementation("cpu", choice)(logits, *groups, 0, 4, True)
