"""How sure an order of layers is, on made-up prompts whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from sluice.models.offline.calibrate.depth.order_evidence import UNITS, order_evidence
from sluice.models.profile.layer_fields import ImportanceEvidence

TRUTH = np.array([0.5, 0.2, 0.2, 0.8])
"""Importance of four layers, of which 1 and 2 are alike."""


def drawn(seed: int, prompts: int, tokens: int | None = None) -> tuple[Any, NDArray[Any]]:
    """Sums (prompts, layers, kinds) and tokens; what a prompt is like shifts all of its tokens."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(5, 40, prompts) if tokens is None else np.full(prompts, tokens)
    means = TRUTH + rng.normal(0.0, 0.05, (prompts, len(TRUTH)))
    return (means * counts[:, None])[..., None].repeat(len(UNITS), axis=2), counts


def evidence(seed: int, prompts: int, tokens: int | None = None) -> ImportanceEvidence:
    sums, counts = drawn(seed, prompts, tokens)
    means = sums.sum(0) / counts.sum()
    return order_evidence({name: means[:, k] for k, name in enumerate(UNITS)}, sums, counts)


def test_intervals_hold_the_truth_often_enough() -> None:
    held = []
    for seed in range(400):
        block = evidence(seed, 12).block
        assert block is not None
        held += [low <= t <= high for (low, high), t in zip(block.intervals, TRUTH, strict=True)]
    assert 0.92 < np.mean(held) < 0.98


def test_layers_that_are_alike_are_said_to_be() -> None:
    told_apart = 0
    for seed in range(100):
        found = evidence(seed, 12)
        assert found.block is not None
        assert [*found.block.order[2:]] == [0, 3]
        assert max(found.block.p_values[1:]) < 1e-3
        if found.block.p_values[0] <= 0.05:
            told_apart += 1
            continue
        less, more = found.block.order[:2]
        note = "12 prompts do not show which block is less important: layers "
        assert found.notes[0] == f"{note}{less} and {more}"
    assert told_apart <= 15


def test_p_values_are_those_of_pairs_of_the_same_prompts() -> None:
    sums, counts = drawn(3, 10, tokens=7)
    found = evidence(3, 10, tokens=7).block
    assert found is not None
    means = sums[..., 0] / counts[:, None]
    pairs = zip(found.order[1:], found.order, strict=False)
    raw = [ttest_rel(means[:, a], means[:, b], alternative="greater").pvalue for a, b in pairs]
    # Three kinds with the same numbers: nine tests, each three times.
    ordered = sorted(raw * 3)
    for p, own in zip(found.p_values, raw, strict=True):
        rank = max(r for r, each in enumerate(ordered, 1) if each <= own)
        assert p == pytest.approx(min(ordered[r - 1] * 9 / r for r in range(rank, 10)), rel=1e-6)


def test_a_model_of_one_layer_has_no_pair() -> None:
    sums, counts = drawn(0, 9)
    found = order_evidence({name: [0.5] for name in UNITS}, sums[:, :1], counts)
    assert found.block is not None
    assert (found.block.order, found.block.p_values, found.notes) == ((0,), (), ())


def test_seven_prompts_show_nothing() -> None:
    found = evidence(0, 7)
    assert found.block is None
    assert found.notes == (
        "7 different prompts do not show how sure the order of layers is: it takes 8",
    )
