"""Shared sets against a direct transcription of their definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import budgets
from support.references.experts import ExpertReference
from support.references.routes import NOTHING, choice_scores
from support.tiny import VOCABULARY, make_model

from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON
from sluice.kernels.ops.batch_budget import LYNX, OEA, XSHARE, batch_budget
from sluice.models.experts.router import shared_set
from sluice.models.policy.experts import BudgetMethod, ExpertBudget, ExpertPolicy

EXPERTS = (1, 2, 3, 7, 8, 13, 16, 31, 64, 97)
ROWS = (1, 2, 5, 11, 32)
STEP = 1 / 64
"""Scores on this grid add up exactly, so ties are ties for everybody."""


def members(mask: torch.Tensor) -> set[int]:
    assert mask.dtype == torch.bool
    return set(torch.nonzero(mask).flatten().tolist())


def shares(scores: torch.Tensor, choice: torch.Tensor, size: int, kind: str) -> list[set[int]]:
    """The sets of all methods at one size, from one implementation."""
    share = batch_budget.implementation("cpu", kind)
    sizes = {OEA: min(size, 4), XSHARE: size, LYNX: size}
    return [members(share(choice, scores, method, each)) for method, each in sizes.items()]


def assert_as_defined(
    scores: torch.Tensor, choice: torch.Tensor, size: int, kinds: Sequence[str] = (AUTO, REFERENCE)
) -> None:
    """All methods, at one size."""
    rows, choices = scores.tolist(), choice.tolist()
    wanted = [
        budgets.oea(choices, min(size, 4)),
        budgets.xshare(rows, choices, size),
        budgets.lynx(rows, choices, size),
    ]
    for kind in kinds:
        assert shares(scores, choice, size, kind) == wanted, kind


@st.composite
def batches(draw: st.DrawFn, *, grid: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores, selection scores with some out of reach, and a size."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows, experts = rng.choice(ROWS), rng.choice(EXPERTS)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if grid:
        scores = torch.randint(1, 9, (rows, experts), generator=generator) * STEP
    else:
        scores = torch.randn(rows, experts, generator=generator).mul(2.0).softmax(-1)
    choice = scores.clone()
    if rng.random() < 0.6:
        reach = torch.rand(rows, experts, generator=generator) < rng.choice([0.2, 0.7])
        reach[torch.arange(rows), torch.randint(experts, (rows,), generator=generator)] = True
        choice[~reach] = -math.inf
    return scores, choice, rng.randint(1, experts)


@settings(max_examples=150, deadline=None)
@given(batches(grid=False))
def test_random_scores(batch: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    scores, choice, size = batch
    assert_as_defined(scores, choice, size)


@settings(max_examples=40, deadline=None)
@given(st.booleans().flatmap(lambda grid: batches(grid=grid)))
def test_triton(batch: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    scores, choice, size = batch
    # Among a row's own best, ties are top-k's to break: none there.
    choice = choice + torch.arange(choice.shape[1], 0, -1) * 1e-4
    assert_as_defined(scores, choice, size, [TRITON])


@settings(max_examples=150, deadline=None)
@given(batches(grid=True))
def test_ties_of_a_set_go_to_the_lower_expert(
    batch: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    scores, choice, size = batch
    # Among a row's own best, ties are top-k's to break: none there.
    choice = choice + torch.arange(choice.shape[1], 0, -1) * 1e-4
    assert_as_defined(scores, choice, size)


@settings(max_examples=100, deadline=None)
@given(batches(grid=False), st.integers(0, 2**32))
def test_rows_that_select_by_more_than_their_scores(
    batch: tuple[torch.Tensor, torch.Tensor, int], seed: int
) -> None:
    """A correction or a bias: the row's best is then not its highest score."""
    scores, choice, size = batch
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(choice.shape[1], generator=generator) * 0.1
    assert_as_defined(scores, choice + bias, size)


@settings(max_examples=100, deadline=None)
@given(batches(grid=False))
def test_every_row_keeps_its_best(batch: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    scores, choice, size = batch
    best = set(choice.argmax(-1).tolist())
    reach = members((choice > -math.inf).any(0))
    for kind in (AUTO, REFERENCE):
        share = batch_budget.implementation("cpu", kind)
        assert members(share(choice, scores, OEA, 1)) == best
        assert members(share(choice, scores, OEA, choice.shape[1])) == reach
        for found in shares(scores, choice, size, kind)[1:]:
            assert best <= found <= reach
            assert len(found) == min(max(size, len(best)), len(reach))


@pytest.mark.parametrize("kind", [AUTO, REFERENCE, TRITON])
def test_experts_without_merit_fill_what_is_left(kind: str) -> None:
    """An expert that no row can reach takes nobody's place, nothing having any score."""
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    choice = torch.tensor([[1.0, -math.inf, 0.0, 0.0]])
    assert shares(scores, choice, 2, kind)[1] == {0, 2}
    assert shares(scores, choice, 3, kind)[1] == {0, 2, 3}


def test_budgets_name_their_methods() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(6, 16, generator=generator).softmax(-1)
    args = (scores, scores)
    oea = shared_set(ExpertBudget(BudgetMethod.OEA, k0=2), *args)
    xshare = shared_set(ExpertBudget(BudgetMethod.XSHARE, experts=9), *args)
    lynx = shared_set(ExpertBudget(BudgetMethod.LYNX, experts=9), *args)
    assert torch.equal(oea, batch_budget.reference(scores, scores, OEA, 2))
    assert torch.equal(xshare, batch_budget.reference(scores, scores, XSHARE, 9))
    assert torch.equal(lynx, batch_budget.reference(scores, scores, LYNX, 9))
    assert not torch.equal(xshare, lynx)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "deepseek_v3"])
def test_recorded_scores(family: str, models_folder: Path) -> None:
    """What a model's routers make of a prompt, with its groups and its correction."""
    reference = ExpertReference(make_model(family, models_folder / f"budgets-{family}"))
    rng = random.Random(5)
    prompt = [rng.randrange(VOCABULARY) for _ in range(48)]
    run = reference.run(prompt, ExpertPolicy(), 1)
    for layer, scores in zip(run.layers, run.scores, strict=True):
        router = reference.routers[layer]
        for rows in scores.split(12):
            choice = torch.tensor([choice_scores(row, router, NOTHING) for row in rows.tolist()])
            assert (router.groups > 1) == bool((choice == -math.inf).any())
            for size in (1, 3, 5, 7):
                assert_as_defined(rows, choice, size)
