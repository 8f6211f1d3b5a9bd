"""Strong and weak logits together, and which tokens are plausible."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.poison import poisoned_memory
from support.references.experts import contrasted

from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON
from sluice.kernels.ops.contrast_logits import contrast_logits
from sluice.models.policy.experts import Contrast

VOCABULARIES = (2, 7, 61, 256)
MANY = settings(max_examples=100, deadline=None)
FEW = settings(max_examples=25, deadline=None)
"""Triton's interpreter is slow."""
Drawn = tuple[torch.Tensor, torch.Tensor, list[Contrast]]
implementations = pytest.mark.parametrize("choice", [AUTO, REFERENCE, TRITON])
quick = pytest.mark.parametrize("choice", [AUTO, REFERENCE])


@pytest.fixture(autouse=True, scope="module")
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@st.composite
def passes(draw: st.DrawFn) -> Drawn:
    """Logits of both passes, and how each row combines them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows, vocabulary = rng.choice([1, 2, 5, 11]), rng.choice(VOCABULARIES)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    strong, weak = 4.0 * torch.randn(2, rows, vocabulary, generator=generator)
    betas, alphas = [0.0, 0.25, 0.5, 3.0], [0.01, 0.1, 0.7, 1.0]
    contrasts = [Contrast(1, rng.choice(betas), rng.choice(alphas)) for _ in range(rows)]
    return strong, weak, contrasts


def combined(
    choice: str, strong: torch.Tensor, weak: torch.Tensor, contrasts: list[Contrast]
) -> torch.Tensor:
    beta, alpha = (torch.tensor([getattr(c, n) for c in contrasts]) for n in ("beta", "alpha"))
    before = strong.clone(), weak.clone()
    found = contrast_logits.implementation("cpu", choice)(strong, weak, beta, alpha)
    assert found.shape == strong.shape
    assert found.dtype == strong.dtype
    assert found.is_contiguous()
    assert not found.isnan().any()
    assert torch.equal(strong, before[0])
    assert torch.equal(weak, before[1])
    return found


def assert_as_defined(found: torch.Tensor, drawn: Drawn) -> None:
    """Plausible tokens by the definition; the others without probability, in the strong order."""
    strong, weak, contrasts = drawn
    shares = found.softmax(-1)
    ratio = (strong - strong.amax(-1, keepdim=True)).exp()
    for row, contrast in enumerate(contrasts):
        expected = contrasted(strong[row], weak[row], contrast)
        plausible = expected.isfinite()
        torch.testing.assert_close(found[row, plausible], expected[plausible], rtol=1e-5, atol=1e-5)
        out = ratio[row] < contrast.alpha - 1e-4
        inside = ratio[row] > contrast.alpha + 1e-4
        assert not shares[row, out].any()
        assert bool(inside[strong[row].argmax()]) or contrast.alpha == 1.0
        # Where a grammar rules the plausible ones out, the strong pass's order decides.
        ranked = found[row, out][strong[row, out].argsort(descending=True)]
        assert bool((ranked.diff() <= 0).all())
        below = expected[plausible].min() - 1e4 + strong[row, out] - strong[row].max()
        torch.testing.assert_close(found[row, out], below, rtol=1e-6, atol=1e-3)


@quick
@MANY
@given(drawn=passes())
def test_definition(choice: str, drawn: Drawn) -> None:
    assert_as_defined(combined(choice, *drawn), drawn)


@FEW
@given(drawn=passes())
def test_triton_definition(drawn: Drawn) -> None:
    assert_as_defined(combined(TRITON, *drawn), drawn)


@implementations
@pytest.mark.parametrize("tokens", [4096, 4097, 9001], ids=["one tile", "and one", "a prime"])
def test_vocabularies_beyond_a_tile(choice: str, tokens: int) -> None:
    """Best and lowest plausible tokens in tiles of their own, and tiles with none of them."""
    generator = torch.Generator().manual_seed(tokens)
    strong, weak = torch.randn(2, 4, tokens, generator=generator)
    strong[0, tokens - 1], strong[0, 3] = 40.0, 39.9
    strong[1, 0], strong[1, tokens - 2] = 40.0, 39.9
    strong[3, tokens - 1] = 40.0
    weak[:, 3], weak[:, tokens - 2] = 25.0, 30.0
    drawn = strong, weak, [Contrast(1, 0.5, alpha) for alpha in (0.1, 0.2, 0.05, 0.5)]
    assert_as_defined(combined(choice, *drawn), drawn)


@implementations
def test_ties_of_the_best_are_all_plausible(choice: str) -> None:
    strong = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0]])
    weak = torch.tensor([[0.0, 1.0, 2.0, 5.0, 3.0]])
    found = combined(choice, strong, weak, [Contrast(1, 1.0, 1.0)])
    assert found[0, [1, 2, 4]].tolist() == [5.0, 4.0, 3.0]
    assert found[0, [0, 3]].tolist() == [3.0 - 1e4 - 2.0, 3.0 - 1e4 - 5.0]


@implementations
@pytest.mark.parametrize("beta", [2e3, 1e4, 1e6])
def test_implausible_tokens_lose_whatever_the_weak_pass_weighs(choice: str, beta: float) -> None:
    strong = torch.tensor([[4.0, 3.0, -5.0, -6.0]])
    weak = torch.tensor([[9.0, 10.0, 0.0, 0.0]])
    found = combined(choice, strong, weak, [Contrast(1, beta, 0.1)])
    assert int(found.argmax()) == 0
    assert not found.softmax(-1)[0, 2:].any()


@quick
@MANY
@given(drawn=passes())
def test_without_weight_the_weak_pass_changes_nothing(choice: str, drawn: Drawn) -> None:
    strong, weak, contrasts = drawn
    found = combined(choice, strong, weak, [Contrast(1, 0.0, c.alpha) for c in contrasts])
    kept = found.softmax(-1) > 0
    assert torch.equal(found[kept], strong[kept])


@quick
@MANY
@given(drawn=passes())
def test_rows_do_not_depend_on_each_other(choice: str, drawn: Drawn) -> None:
    strong, weak, contrasts = drawn
    found = combined(choice, *drawn)
    for row, contrast in enumerate(contrasts):
        own = slice(row, row + 1)
        assert torch.equal(combined(choice, strong[own], weak[own], [contrast]), found[own])


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_fp32_and_keeps_the_dtype(choice: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    strong, weak = (8.0 * torch.randn(2, 3, 50, generator=generator)).to(dtype)
    contrasts = [Contrast(1, 1.5, 0.1)] * 3
    found = combined(choice, strong, weak, contrasts)
    plain = combined(choice, strong.float(), weak.float(), contrasts)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    cut = 2**-7 if choice == TRITON and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found, plain.to(dtype), rtol=cut, atol=0.0)


@implementations
def test_strided_logits(choice: str) -> None:
    generator = torch.Generator().manual_seed(9)
    strong, weak = torch.randn(2, 7, 31, generator=generator)
    wide = torch.full((7, 2 * 31 + 1), 99.0)
    wide[:, 1::2] = weak
    contrasts = [Contrast(1, 0.5, 0.1)] * 7
    found = combined(choice, strong.t().contiguous().t(), wide[:, 1::2], contrasts)
    assert torch.equal(found, combined(choice, strong, weak, contrasts))


@implementations
def test_tokens_out_for_both_passes_stay_out(choice: str) -> None:
    """A padded vocabulary is minus infinity in both."""
    strong = torch.tensor([[2.0, 1.0, -torch.inf]])
    weak = torch.tensor([[1.0, 2.0, -torch.inf]])
    found = combined(choice, strong, weak, [Contrast(1, 0.5, 0.1)])
    assert found.tolist() == [[2.5, 0.5, -torch.inf]]


@implementations
def test_one_token_left(choice: str) -> None:
    strong, weak = torch.full((2, 5), -torch.inf), torch.zeros(2, 5)
    strong[0, 4], strong[1, 0] = 3.0, -2.0
    found = combined(choice, strong, weak, [Contrast(1, 0.5, 0.1)] * 2)
    expected = torch.full((2, 5), -torch.inf)
    expected[0, 4], expected[1, 0] = 4.5, -3.0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype: torch.dtype) -> None:
    strong, weak = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    args = (strong, weak, torch.full((3,), 0.5), torch.full((3,), 0.1))
    torch.library.opcheck(contrast_logits.op.default, args)
