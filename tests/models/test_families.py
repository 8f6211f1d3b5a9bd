"""Every family against transformers with the same sub-layers silenced; real engine, fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, engine
from reference import Reference
from tiny import FAMILIES, LAYERS, VOCABULARY, make_model

from sluice.models.families import FAMILIES as DESCRIBED
from sluice.models.policy import Phase, SkipSet

TOKENS = 10


def random_skip(rng: random.Random, phase: Phase) -> SkipSet:
    def some() -> tuple[int, ...]:
        return tuple(rng.sample(range(LAYERS), rng.randrange(LAYERS)))

    return SkipSet.of(blocks=some()[:2], attention=some(), mlp=some(), phase=phase)


def random_prompt(rng: random.Random, low: int = 3, high: int = 50) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randrange(low, high))]


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, models_folder: Path
) -> Iterator[tuple[Engine, Reference]]:
    folder = make_model(request.param, models_folder / request.param)
    with engine(folder) as running:
        yield running, Reference(folder)


def test_every_described_family_is_tested() -> None:
    assert {family.name for family in DESCRIBED} == set(FAMILIES)


@pytest.mark.parametrize("phase", list(Phase))
def test_random_masks_equal_the_reference(served: tuple[Engine, Reference], phase: Phase) -> None:
    running, reference = served
    rng = random.Random(f"{phase}")
    prompts = [random_prompt(rng) for _ in range(5)]
    skips = [
        SkipSet.of(attention=(rng.randrange(LAYERS),), phase=phase),
        SkipSet.of(mlp=(rng.randrange(LAYERS),), phase=phase),
        SkipSet.of(blocks=(rng.randrange(LAYERS),), phase=phase),
        random_skip(rng, phase),
        random_skip(rng, phase),
    ]
    expected = [
        reference.greedy(prompt, skip, TOKENS) for prompt, skip in zip(prompts, skips, strict=True)
    ]
    alone = [
        running.generate([prompt], [skip], TOKENS)[0]
        for prompt, skip in zip(prompts, skips, strict=True)
    ]
    together = running.generate([*prompts, prompts[0]], [*skips, None], TOKENS)
    assert alone == expected
    assert together[:-1] == expected
    assert together[-1] == reference.greedy(prompts[0], SkipSet(), TOKENS)


def test_a_skip_changes_tokens(served: tuple[Engine, Reference]) -> None:
    """Guards the tests above: a mask that is not applied must be visible."""
    running, _ = served
    prompt = random_prompt(random.Random(1), 20, 21)
    full = running.generate([prompt], [None], TOKENS)[0]
    skips = [SkipSet.of(attention=(2,)), SkipSet.of(mlp=(3,)), SkipSet.of(blocks=(4,))]
    for routed in running.generate([prompt] * 3, skips, TOKENS):
        assert routed != full
