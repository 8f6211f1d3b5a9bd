"""Strong and weak logits together, and which tokens are plausible."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.experts import contrasted

from sluice.kernels.contrast_logits import contrast_logits
from sluice.models.expert_policy import Contrast

VOCABULARIES = (2, 7, 61, 256)
MANY = settings(max_examples=100, deadline=None)


@st.composite
def passes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[Contrast]]:
    """Logits of both passes, and how each row combines them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows, vocabulary = rng.choice([1, 2, 5, 11]), rng.choice(VOCABULARIES)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    strong, weak = 4.0 * torch.randn(2, rows, vocabulary, generator=generator)
    betas, alphas = [0.0, 0.25, 0.5, 3.0], [0.01, 0.1, 0.7, 1.0]
    contrasts = [Contrast(1, rng.choice(betas), rng.choice(alphas)) for _ in range(rows)]
    return strong, weak, contrasts


def combined(strong: torch.Tensor, weak: torch.Tensor, contrasts: list[Contrast]) -> torch.Tensor:
    beta, alpha = (torch.tensor([getattr(c, n) for c in contrasts]) for n in ("beta", "alpha"))
    return contrast_logits(strong, weak, beta, alpha)


@MANY
@given(passes())
def test_definition(drawn: tuple[torch.Tensor, torch.Tensor, list[Contrast]]) -> None:
    strong, weak, contrasts = drawn
    found = combined(*drawn)
    for row, contrast in enumerate(contrasts):
        expected = contrasted(strong[row], weak[row], contrast)
        plausible = expected.isfinite()
        torch.testing.assert_close(found[row, plausible], expected[plausible], rtol=1e-5, atol=1e-5)


@MANY
@given(passes())
def test_the_best_of_the_strong_pass_stays_and_the_implausible_has_no_probability(
    drawn: tuple[torch.Tensor, torch.Tensor, list[Contrast]],
) -> None:
    strong, _, contrasts = drawn
    found = combined(*drawn)
    shares = found.softmax(-1)
    assert not found.isnan().any()
    ratio = (strong - strong.amax(-1, keepdim=True)).exp()
    for row, contrast in enumerate(contrasts):
        out = ratio[row] < contrast.alpha - 1e-4
        inside = ratio[row] > contrast.alpha + 1e-4
        assert not shares[row, out].any()
        assert bool(inside[strong[row].argmax()]) or contrast.alpha == 1.0
        # Where a grammar rules the plausible ones out, the strong pass's order decides.
        ranked = found[row, out][strong[row, out].argsort(descending=True)]
        assert bool((ranked.diff() <= 0).all())


@pytest.mark.parametrize("beta", [2e3, 1e4, 1e6])
def test_implausible_tokens_lose_whatever_the_weak_pass_weighs(beta: float) -> None:
    strong = torch.tensor([[4.0, 3.0, -5.0, -6.0]])
    weak = torch.tensor([[9.0, 10.0, 0.0, 0.0]])
    found = combined(strong, weak, [Contrast(1, beta, 0.1)])
    assert int(found.argmax()) == 0
    assert not found.softmax(-1)[0, 2:].any()


@MANY
@given(passes())
def test_without_weight_the_weak_pass_changes_nothing(
    drawn: tuple[torch.Tensor, torch.Tensor, list[Contrast]],
) -> None:
    strong, weak, contrasts = drawn
    found = combined(strong, weak, [Contrast(1, 0.0, c.alpha) for c in contrasts])
    kept = found.softmax(-1) > 0
    assert torch.equal(found[kept], strong[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_fp32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    strong, weak = (8.0 * torch.randn(2, 3, 50, generator=generator)).to(dtype)
    before = strong.clone(), weak.clone()
    contrasts = [Contrast(1, 1.5, 0.1)] * 3
    found = combined(strong, weak, contrasts)
    assert found.dtype == dtype
    assert torch.equal(found, combined(strong.float(), weak.float(), contrasts).to(dtype))
    assert torch.equal(strong, before[0])
    assert torch.equal(weak, before[1])


def test_tokens_out_for_both_passes_stay_out() -> None:
    """A padded vocabulary is minus infinity in both."""
    strong = torch.tensor([[2.0, 1.0, -torch.inf]])
    weak = torch.tensor([[1.0, 2.0, -torch.inf]])
    found = combined(strong, weak, [Contrast(1, 0.5, 0.1)])
    assert found.tolist() == [[2.5, 0.5, -torch.inf]]
