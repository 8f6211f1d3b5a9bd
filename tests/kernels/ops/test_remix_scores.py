"""Pulled scores: who takes part, what stays, and the definition row by row."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.remixes import blended

from sluice.kernels.ops.router_scores import remix_scores

EXPERTS = (1, 2, 5, 8, 13, 64, 97)
MANY = settings(max_examples=150, deadline=None)


@st.composite
def pulls(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `remix_scores`; a third of the references is 0."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows, experts = rng.choice([1, 2, 7, 11]), rng.choice(EXPERTS)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    scores = torch.randn(rows, experts, generator=generator).mul(2.0).softmax(-1)
    if rng.random() < 0.3:
        scores = scores.bfloat16().float()
    reference = torch.rand(rows, experts, generator=generator) * rng.choice([1e-3, 1.0, 50.0])
    reference[torch.rand(rows, experts, generator=generator) < 0.3] = 0.0
    reference[torch.rand(rows, generator=generator) < 0.2] = 0.0
    alpha = torch.rand(rows, generator=generator)
    alpha[torch.rand(rows, generator=generator) < 0.2] = 0.0
    top = torch.randint(1, experts + 1, (rows,), generator=generator)
    return scores, reference, alpha, top


@MANY
@given(pulls())
def test_definition(
    pull: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, reference, alpha, top = pull
    mixed = remix_scores(*pull)
    assert mixed.dtype == torch.float32
    for row in range(len(scores)):
        expected = blended(
            scores[row].tolist(), reference[row].tolist(), float(alpha[row]), int(top[row])
        )
        assert mixed[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@MANY
@given(pulls())
def test_mass_is_kept_and_the_rest_untouched(
    pull: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, reference, _, top = pull
    mixed = remix_scores(*pull)
    assert bool((mixed >= 0).all())
    torch.testing.assert_close(mixed.sum(-1), scores.sum(-1), rtol=1e-5, atol=0.0)
    for row in range(len(scores)):
        order = scores[row].sort(descending=True, stable=True).indices
        inside, outside = order[: int(top[row])], order[int(top[row]) :]
        assert torch.equal(mixed[row, outside], scores[row, outside])
        if not reference[row, inside].any():
            assert torch.equal(mixed[row], scores[row])


@MANY
@given(pulls())
def test_rows_with_all_of_their_own_share_do_not_move(
    pull: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    scores, reference, alpha, top = pull
    assert torch.equal(remix_scores(scores, reference, torch.ones_like(alpha), top), scores)


@MANY
@given(pulls())
def test_rows_do_not_depend_on_each_other(
    pull: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    mixed = remix_scores(*pull)
    for row in range(len(mixed)):
        (alone,) = remix_scores(*(part[row : row + 1] for part in pull))
        assert torch.equal(alone, mixed[row])


def test_arguments_are_left_alone_and_may_be_strided() -> None:
    generator = torch.Generator().manual_seed(3)
    scores, reference = torch.rand(2, 9, 7, generator=generator).unbind()
    before = scores.clone(), reference.clone()
    alpha, top = torch.full((7,), 0.3), torch.full((7,), 4)
    strided = remix_scores(scores.t(), reference.t(), alpha, top)
    plain = remix_scores(scores.t().contiguous(), reference.t().contiguous(), alpha, top)
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=0.0)
    assert torch.equal(scores, before[0])
    assert torch.equal(reference, before[1])


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-42])
def test_a_reference_of_next_to_nothing(tiny: float) -> None:
    """Its mass may lie outside the row's best, and what is left of it be too small to divide by."""
    scores = torch.tensor([[0.6, 0.3, 0.07, 0.03]])
    reference = torch.tensor([[tiny, 3 * tiny, 0.5, 0.5]])
    mixed = remix_scores(scores, reference, torch.tensor([0.5]), torch.tensor([2]))
    assert bool(mixed.isfinite().all())
    torch.testing.assert_close(mixed.sum(), scores.sum(), rtol=1e-5, atol=0.0)
    assert torch.equal(mixed[0, 2:], scores[0, 2:])
