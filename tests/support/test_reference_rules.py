"""Every rule of the plain reference on numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support.references.choices import threshold_between
from support.references.exits import ExitTest, decayed
from support.references.prompts import (
    VoidWalk,
    cosine_share,
    first_probability,
    lac_ranges,
    mean_cosines,
    mod_tokens,
    similar_blocks,
    void_blocks,
)
from torch import Tensor

from sluice.models.policy.policy import AdaptiveRule, ExitRule


def exit_decision(
    method: str,
    threshold: float | None = 0.5,
    patience: int | None = None,
    heads: dict[str, Tensor] | None = None,
) -> ExitTest:
    """The residual stream is the logits."""
    rule = ExitRule(method, (0, 1, 2), threshold=threshold, patience=patience)
    return ExitTest(rule, lambda state: state, heads or {}, 0, 10)


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log() + 3.0


NOTHING = torch.zeros(3)


class TestExits:
    def test_confidence_is_first_minus_second(self) -> None:
        score = exit_decision("confidence").score(NOTHING, logits(0.3, 0.5, 0.2))
        assert score == pytest.approx(0.2, abs=1e-6)

    def test_entropy_is_in_nats(self) -> None:
        score = exit_decision("entropy").score(NOTHING, logits(0.5, 0.25, 0.25))
        assert score == pytest.approx(1.5 * math.log(2.0), abs=1e-6)

    def test_saturation_is_the_cosine(self) -> None:
        score = exit_decision("saturation").score(
            torch.tensor([3.0, 4.0]), torch.tensor([8.0, 6.0])
        )
        assert score == pytest.approx(0.96, abs=1e-6)

    def test_patience_counts_agreeing_exits(self) -> None:
        test = exit_decision("patience", threshold=None, patience=2)
        scores = [test.score(NOTHING, torch.eye(3)[answer]) for answer in (1, 1, 2, 2, 2)]
        assert scores == [0.0, 1.0, 0.0, 1.0, 2.0]
        assert [test.leaves(score) for score in scores] == [False, False, False, False, True]

    def test_q_exit_spends_probability(self) -> None:
        zero = {f"q_exit.{i}.{name}": torch.zeros(1) for i in range(3) for name in ("bias",)}
        weights = {"0": torch.zeros(1, 2), "1": torch.zeros(1, 1), "2": torch.zeros(1, 1)}
        zero |= {f"q_exit.{i}.weight": weight for i, weight in weights.items()}
        test = exit_decision("q_exit", 0.75, heads=zero)
        scores = [test.score(torch.ones(1), torch.ones(1)) for _ in range(3)]
        assert scores == [0.5, 0.75, 0.875]
        assert [test.leaves(score) for score in scores] == [False, False, True]

    def test_q_exit_reads_after_then_before(self) -> None:
        heads = {
            "q_exit.0.weight": torch.tensor([[2.0, 0.5]]),
            "q_exit.0.bias": torch.tensor([0.1]),
            "q_exit.1.weight": torch.tensor([[-3.0]]),
            "q_exit.1.bias": torch.tensor([0.2]),
            "q_exit.2.weight": torch.tensor([[1.5]]),
            "q_exit.2.bias": torch.tensor([-0.4]),
        }
        score = exit_decision("q_exit", heads=heads).score(torch.tensor([0.6]), torch.tensor([0.3]))
        inner = math.tanh(-3.0 * math.tanh(2.0 * 0.3 + 0.5 * 0.6 + 0.1) + 0.2)
        assert score == pytest.approx(1.0 / (1.0 + math.exp(-(1.5 * inner - 0.4))), abs=1e-6)

    def test_classifier_is_a_sigmoid(self) -> None:
        heads = {
            "classifier.weight": torch.tensor([1.0, -1.0]),
            "classifier.bias": torch.tensor(0.5),
        }
        score = exit_decision("classifier", heads=heads).score(NOTHING, torch.tensor([2.0, 1.0]))
        assert score == pytest.approx(1.0 / (1.0 + math.exp(-1.5)), abs=1e-6)

    @pytest.mark.parametrize(
        ("method", "below", "at", "above"),
        [
            ("confidence", False, True, True),
            ("saturation", False, True, True),
            ("classifier", False, True, True),
            ("entropy", True, True, False),
            ("q_exit", False, False, True),
        ],
    )
    def test_which_side_of_the_threshold_leaves(
        self, method: str, below: bool, at: bool, above: bool
    ) -> None:
        test = exit_decision(method, 0.5)
        assert [test.leaves(score) for score in (0.25, 0.5, 0.75)] == [below, at, above]
        assert test.margin == 0.0

    def test_decay_of_the_threshold(self) -> None:
        rule = ExitRule("confidence", (0,), threshold=0.8, decay=4.0)
        assert decayed(rule, 0, 10) == pytest.approx(0.82)
        assert decayed(rule, 5, 10) == pytest.approx(0.72 + 0.1 * math.exp(-2.0))
        assert decayed(ExitRule("saturation", (0,), threshold=-1.0, decay=4.0), 3, 10) == 0.0
        assert decayed(ExitRule("confidence", (0,), threshold=0.8), 5, 10) == 0.8
        with pytest.raises(ValueError, match="entropy"):
            decayed(ExitRule("entropy", (0,), threshold=0.8, decay=4.0), 5, 10)


def norms(*values: float) -> Tensor:
    """States of one token with these norms, (layers + 1, 1, 2)."""
    return torch.tensor([[[0.6 * value, -0.8 * value]] for value in values])


class TestPromptMethods:
    def test_first_pools_logits(self) -> None:
        heads = {
            "first.weight": torch.tensor([[9.0, 9.0], [1.0, 2.0]]),
            "first.bias": torch.tensor([9.0, -0.5]),
        }
        states = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        # (1 - 0.5 + 2 - 0.5) / 2 = 1
        expected = 1.0 / (1.0 + math.exp(-1.0))
        assert first_probability(1, states, heads) == pytest.approx(expected, abs=1e-6)

    def test_cosines_are_averaged_over_tokens(self) -> None:
        states = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [0.0, 2.0]]])
        assert mean_cosines(states) == [pytest.approx(0.48, abs=1e-6)]

    def test_similar_blocks(self) -> None:
        cosines = [0.5, 0.9, 0.7, 0.9]
        at = AdaptiveRule("similarity", threshold=0.7)
        assert similar_blocks(cosines, at) == ({1, 2, 3}, 0.0)
        one = AdaptiveRule("similarity", budget=0.75)
        assert similar_blocks(cosines, one)[0] == {3}
        # 4 * (1 - 0.625) = 1.5 rounds up.
        two = AdaptiveRule("similarity", budget=0.625)
        assert similar_blocks(cosines, two) == ({1, 3}, pytest.approx(0.2))
        assert similar_blocks(cosines, AdaptiveRule("similarity", budget=1.0))[0] == set()

    def test_void_blocks(self) -> None:
        # Changes 4, 1, 2, 2.5, -1; ranges over earlier layers 0, 0, 3, 3, 3.
        states = norms(1.0, 5.0, 6.0, 8.0, 10.5, 9.5)
        ranges = [(4.0, 0.0), (1.0, 0.0), (2.0, 3.0), (2.5, 3.0), (-1.0, 3.0)]
        for found, expected in zip(lac_ranges(states), ranges, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
        mask, margin = void_blocks(states, AdaptiveRule("lac", mode="predict", threshold=0.8))
        assert mask == {2, 4}
        assert margin == pytest.approx(0.1, abs=1e-5)
        assert void_blocks(states, AdaptiveRule("lac", mode="predict", threshold=0.5))[0] == {4}

    def test_the_first_two_layers_are_void_only_if_the_norm_falls(self) -> None:
        rule = AdaptiveRule("lac", mode="predict", threshold=1.0)
        assert void_blocks(norms(5.0, 4.0, 3.5), rule)[0] == {0, 1}
        assert void_blocks(norms(5.0, 5.5, 5.75), rule)[0] == set()

    def test_void_walk_keeps_tokens_apart(self) -> None:
        states = torch.cat([norms(1, 5, 6, 8, 10.5, 9.5), norms(5, 4, 6, 9, 10, 12)], dim=1)
        walk = VoidWalk(0.8, states[0])
        voids = [walk.void(before, after) for before, after in pairwise(states)]
        # Second token: changes -1, 2, 3, 1, 2; ranges 0, 0, 3, 4, 4.
        assert torch.stack(voids).T.int().tolist() == [[0, 0, 1, 0, 1], [1, 0, 0, 1, 1]]
        torch.testing.assert_close(walk.active, torch.stack([states[4, 0], states[3, 1]]))

    def test_mod_keeps_what_stands_out(self) -> None:
        common, rare, last = [1.0, 0.0], [0.0, 1.0], [1.0, 0.1]
        embeddings = torch.tensor([common, rare, common, common, last])
        # The last token, then the rare one, then of three equals the later.
        kept = mod_tokens(embeddings, 5, (1.0, 0.75, 0.5, 0.2, 0.0))
        assert kept == [{0, 1, 2, 3, 4}, {4, 1, 3}, {4, 1}, {4}, {4}]

    def test_cosine_schedule_is_p_mods(self) -> None:
        shares = [cosine_share(layer, 32) for layer in range(32)]
        assert [layer for layer, share in enumerate(shares) if share == 1.0] == list(range(8))
        assert [layer for layer, share in enumerate(shares) if share == 0.15] == list(range(24, 32))
        # The paper reports 53.8 % of the cache.
        assert sum(shares) / 32 == pytest.approx(0.5375, abs=5e-4)
        assert cosine_share(0, 1) == 1.0


def test_threshold_between_avoids_ties() -> None:
    assert threshold_between([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert threshold_between([1.0, 2.0, 2.0, 2.0], 0.75) == 1.5
    assert threshold_between([1.0, math.inf, 3.0], 0.9) == 2.0
    with pytest.raises(ValueError, match="same"):
        threshold_between([1.0, 1.0], 0.5)
