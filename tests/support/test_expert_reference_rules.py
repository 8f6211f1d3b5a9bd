"""Routing and budgets of the expert reference on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.references.budgets import lynx, oea, shared_experts, xshare
from support.references.routes import GONE, Asked, Router, choice_scores, route

from sluice.models.policy.experts import BudgetMethod, ExpertBudget, ExpertPolicy

SCORES = [0.125, 0.5, 0.0625, 0.25, 0.03125, 0.03125]
"""Experts 1, 3, 0, 2, 4, 5 from best to worst; the last two tie."""

MIXTRAL = Router(top_k=2)
PLAIN = Router(top_k=3, renormalize=False)


def weights(
    router: Router = PLAIN, shared: set[int] | None = None, scores: list[float] = SCORES, **asked
) -> dict[int, float]:
    return route(scores, scores, router, Asked(**asked), shared).weights


class TestSelection:
    def test_stock(self) -> None:
        assert weights() == {0: 0.125, 1: 0.5, 3: 0.25}
        assert weights(MIXTRAL) == pytest.approx({1: 2 / 3, 3: 1 / 3})
        assert weights(Router(2, scale=1.5)) == pytest.approx({1: 1.0, 3: 0.5})
        assert weights(Router(2, renormalize=False, scale=2.0)) == {1: 1.0, 3: 0.5}

    def test_scores(self) -> None:
        logits = torch.tensor([0.0, math.log(3.0)])
        assert Router(1).scores(logits).tolist() == pytest.approx([0.25, 0.75])
        assert Router(1, sigmoid=True).scores(logits).tolist() == pytest.approx([0.5, 0.75])

    def test_ties_go_to_the_lower_expert(self) -> None:
        assert weights(Router(2), scores=[0.1, 0.3, 0.3, 0.3]) == {1: 0.5, 2: 0.5}
        assert 4 in weights(top_k=5)
        assert 5 not in weights(top_k=5)

    def test_the_slot_of_a_masked_expert_is_refilled(self) -> None:
        assert weights(masked={1, 3}) == {0: 0.125, 2: 0.0625, 4: 0.03125}

    def test_bias_moves_the_choice_and_not_the_weight(self) -> None:
        assert weights(bias={5: 0.25, 3: -0.25}) == {0: 0.125, 1: 0.5, 5: 0.03125}
        # 0.03125 + 0.09375 ties with expert 0, which is lower.
        assert weights(Router(3, renormalize=False), bias={4: 0.09375}) == weights()

    def test_correction_does_as_bias(self) -> None:
        router = Router(2, correction=(0.0, 0.0, 0.5, 0.0, 0.0, 0.0))
        assert weights(router) == pytest.approx({1: 8 / 9, 2: 1 / 9})
        assert set(weights(router, bias={2: -0.5})) == {1, 3}

    def test_top_k(self) -> None:
        assert set(weights(top_k=1)) == {1}
        assert set(weights(top_k=6)) == set(range(6))

    def test_layers_have_their_own_numbers(self) -> None:
        policy = ExpertPolicy(
            masked=((0, 1), (1, 2)),
            dropped=((1, 3),),
            forced=((1, 4, None), (2, 0, 0.5)),
            bias=((1, 0, 0.25),),
            top_k=(1, 2, 3),
            skip_ratio=(0.1, 0.2, 0.3),
            top_p=0.5,
        )
        asked = Asked.of(policy, 1, ((1, 5), (2, 3)))
        assert asked == Asked({2}, {3}, {4: None}, {0: 0.25}, 2, 0.2, 0.5, {5})
        bare = Asked.of(ExpertPolicy(top_k=4, skip_ratio=0.1, protect=False), 1, ((1, 5),))
        assert bare == Asked(frozenset(), frozenset(), {}, {}, 4, 0.1, None, frozenset())


GROUPED = [0.9, 0.1, 0.6, 0.5, 0.2, 0.3]
"""Three groups of two: best 0.9, 0.6, 0.3; sums 1.0, 1.1, 0.5."""


class TestGroups:
    def alive(self, router: Router, **asked: object) -> set[int]:
        choice = choice_scores(GROUPED, router, Asked(**asked))
        return {expert for expert, score in enumerate(choice) if score > GONE}

    def test_the_best_or_the_two_best(self) -> None:
        assert self.alive(Router(1, groups=3, topk_group=1)) == {0, 1}
        summed = Router(1, groups=3, topk_group=1, correction=(0.0,) * 6)
        assert self.alive(summed) == {2, 3}
        assert self.alive(Router(1, groups=3, topk_group=2)) == {0, 1, 2, 3}

    def test_masks_and_bias_move_groups(self) -> None:
        router = Router(1, groups=3, topk_group=1)
        assert self.alive(router, masked={0}) == {2, 3}
        assert self.alive(router, masked={0, 2, 3}) == {4, 5}
        assert self.alive(router, bias={5: 0.65}) == {4, 5}
        # Of two, one is left: no sum, and the whole group is out.
        summed = Router(1, groups=3, topk_group=1, correction=(0.0,) * 6)
        assert self.alive(summed, masked={3}) == {0, 1}

    def test_a_forced_expert_brings_its_group(self) -> None:
        router = Router(2, groups=3, topk_group=1, renormalize=False)
        assert self.alive(router, forced={4: None}) == {4, 5}
        forced = route(GROUPED, GROUPED, router, Asked(forced={4: None})).weights
        assert forced == {4: 0.3, 5: 0.3}
        # Two raised groups and room for one: the forced expert of the other stays alone.
        assert self.alive(router, forced={2: None, 5: None}) == {2, 3, 5}


class TestForced:
    def test_takes_a_slot(self) -> None:
        assert weights(forced={5: 0.75}) == {1: 0.5, 3: 0.25, 5: 0.75}
        assert weights(forced={1: None}) == {0: 0.125, 1: 0.1875, 3: 0.25}

    def test_without_a_weight_it_gets_the_mean_of_the_others(self) -> None:
        assert weights(forced={5: None, 4: None}) == {1: 0.5, 4: 0.5, 5: 0.5}
        assert weights(MIXTRAL, forced={5: None}) == {1: 0.5, 5: 0.5}
        # A given weight does not enter the mean.
        assert weights(forced={4: 0.1, 5: None}) == {1: 0.5, 4: 0.1, 5: 0.5}

    def test_alone_it_keeps_its_own_score(self) -> None:
        assert weights(top_k=1, forced={5: None}) == {5: 0.03125}
        assert weights(top_k=2, forced={0: None, 5: None}) == {0: 0.125, 5: 0.03125}

    def test_too_many(self) -> None:
        with pytest.raises(AssertionError, match="slots"):
            weights(top_k=1, forced={4: None, 5: None})


class TestCuts:
    def test_a_dropped_slot_stays_empty(self) -> None:
        assert weights(dropped={3, 5}) == {0: 0.125, 1: 0.5}
        assert weights(MIXTRAL, dropped={3}) == {1: 1.0}
        assert weights(MIXTRAL, dropped={1, 3}) == {}

    def test_ratio_to_the_first(self) -> None:
        assert set(weights(skip_ratio=0.5)) == {1, 3}
        assert set(weights(skip_ratio=0.51)) == {1}
        assert set(weights(skip_ratio=0.25)) == {0, 1, 3}
        # Once the first is dropped, the second is what the others are held against.
        assert set(weights(skip_ratio=0.5, dropped={1})) == {0, 3}

    def test_top_p_keeps_what_starts_within_it(self) -> None:
        assert set(weights(top_p=0.0)) == {1}
        assert set(weights(top_p=0.49)) == {1}
        assert set(weights(top_p=0.5)) == {1, 3}
        assert set(weights(top_p=0.75)) == {0, 1, 3}
        # Sigmoid scores have another sum: 0.5 of 2.
        double = [2 * score for score in SCORES]
        assert set(weights(scores=double, top_p=0.5)) == {1, 3}
        # Ranks that remain are counted, of all experts' scores.
        assert set(weights(dropped={1}, top_p=0.2)) == {3}
        assert set(weights(dropped={1}, top_p=0.25)) == {0, 3}
        assert set(weights(top_k=4, skip_ratio=0.5, top_p=0.75)) == {1, 3}
        # All of it is all of it, in whatever order it is summed.
        whole = [0.0, 0.1, 0.4, 0.2]
        assert len(weights(scores=whole, top_k=4, top_p=1.0)) == 4

    def test_forced_experts_stay_and_rank_by_score(self) -> None:
        assert set(weights(forced={5: 0.0}, skip_ratio=0.9, top_p=0.0)) == {1, 5}
        # The first rank may be a forced one.
        assert set(weights(masked={1}, forced={3: None}, skip_ratio=0.6)) == {3}

    def test_margin(self) -> None:
        assert route(SCORES, SCORES, PLAIN, Asked()).margin == 0.0625
        ratio = route(SCORES, SCORES, PLAIN, Asked(skip_ratio=0.49))
        assert ratio.margin == pytest.approx(0.005)
        assert route(SCORES, SCORES, PLAIN, Asked(top_p=0.51)).margin == pytest.approx(0.01)


class TestProtection:
    def test_comes_back_after_cuts(self) -> None:
        protected = {0, 2}
        for cut in ({"top_k": 1}, {"skip_ratio": 1.0}, {"top_p": 0.0}):
            assert weights(protected=protected, **cut) == {0: 0.125, 1: 0.5}
        # Expert 2 is none that the untouched router selects, whatever lifts it later.
        assert weights(protected=protected) == weights()
        assert set(weights(bias={2: 0.375}, top_k=1, protected={2})) == {1}
        mixed = [0.0625, 0.5, 0.125, 0.25, 0.03125, 0.03125]
        asked = Asked(top_k=1, protected={2, 3})
        assert set(route(SCORES, mixed, PLAIN, asked).weights) == {1, 3}

    def test_a_budget_leaves_it(self) -> None:
        assert set(weights(shared={1, 4}, protected={0})) == {0, 1, 4}
        assert set(weights(shared={1, 2, 3}, protected={0})) == {0, 1, 3}
        assert set(weights(shared={1, 3}, top_k=2, protected={0})) == {0, 1, 3}

    def test_comes_back_after_bias_force_and_re_mixing(self) -> None:
        assert set(weights(bias={0: -1.0}, protected={0})) == {0, 1, 2, 3}
        assert set(weights(forced={5: None}, protected={0})) == {0, 1, 3, 5}
        assert set(weights(forced={5: None}, top_k=1, protected={3, 0})) == {0, 3, 5}
        mixed = [0.0625, 0.5, 0.125, 0.25, 0.03125, 0.03125]
        assert set(route(SCORES, mixed, PLAIN, Asked(protected={0})).weights) == {0, 1, 2, 3}

    def test_nobody_masks_or_drops_it(self) -> None:
        for control in ("masked", "dropped"):
            policy = ExpertPolicy(**{control: ((1, 5),)})
            assert Asked.of(policy, 1, ((2, 5),)).protected == frozenset()
            with pytest.raises(AssertionError, match="wanted"):
                Asked.of(policy, 1, ((1, 5),))

    def test_the_weights_are_made_after_it(self) -> None:
        assert weights(MIXTRAL, top_k=1, protected={3}) == pytest.approx({1: 2 / 3, 3: 1 / 3})
        forced = weights(forced={5: None}, top_k=2, top_p=0.0, protected={3})
        assert forced == {1: 0.5, 3: 0.25, 5: 0.375}


class TestBudgets:
    ROWS = ([0.5, 0.25, 0.125, 0.125], [0.5, 0.0, 0.125, 0.375], [0.0625, 0.25, 0.5, 0.1875])

    def test_rows_choose_within_the_set(self) -> None:
        assert weights(shared={2, 3, 5}) == {2: 0.0625, 3: 0.25, 5: 0.03125}
        assert set(weights(shared={1})) == {1}
        assert set(weights(shared={1}, forced={5: None})) == {1, 5}

    def test_oea(self) -> None:
        assert oea(self.ROWS, 1) == {0, 2}
        assert oea(self.ROWS, 2) == {0, 1, 2, 3}
        assert oea(self.ROWS[:1], 3) == {0, 1, 2}
        assert oea([[GONE, 0.1, GONE, 0.2]], 3) == {1, 3}

    def test_xshare(self) -> None:
        # Sums 1.0625, 0.5, 0.75, 0.6875.
        assert xshare(self.ROWS, self.ROWS, 1) == {0, 2}
        assert xshare(self.ROWS, self.ROWS, 3) == {0, 2, 3}
        # The second row cannot select expert 3: sums 1.0625, 0.5, 0.75, 0.3125.
        choices = [self.ROWS[0], [0.5, 0.0, 0.125, GONE], self.ROWS[2]]
        assert xshare(self.ROWS, choices, 3) == {0, 1, 2}
        assert xshare([[0.25] * 4], [[0.25] * 4], 3) == {0, 1, 2}

    def test_lynx(self) -> None:
        # Bins 0, -2, -3, -3 / 0, -4, -3, -1 / -4, -2, 0, -3.
        # Votes of 1 and 3: 1/4 + 1/16 + 1/4 and 1/8 + 1/2 + 1/8.
        assert lynx(self.ROWS, self.ROWS, 2) == {0, 2}
        assert lynx(self.ROWS, self.ROWS, 3) == {0, 2, 3}
        # Floors of -0.4 and -1.6, and a bin that ends at -5: votes 1, 1/2, 1/4, 1/32.
        row = [0.95, 0.9, 0.75, 0.01]
        pair = [[0.04, 0.9, 0.75, 0.9], [0.9, 0.86, 0.75, 0.04]]
        assert lynx([row], [row], 2) == {0, 1}
        # Votes 1/32 + 1, 1 + 1/2, 1/4 + 1/4, 1 + 1/32.
        assert lynx(pair, pair, 3) == {0, 1, 3}
        assert lynx(pair, pair, 2) == {0, 1}
        # Three votes of the lowest bin outweigh one of the next.
        low = [1.0, 0.1, 0.5]
        assert lynx([low] * 3, [low, [1.0, 0.1, GONE], [1.0, 0.1, GONE]], 2) == {0, 1}

    def test_the_best_is_chosen_by_bias_and_counted_by_score(self) -> None:
        scores, choices = [[0.5, 0.375, 0.125]], [[0.5, 0.375, 0.625]]
        assert xshare(scores, choices, 2) == {0, 2}
        assert lynx(scores, choices, 2) == {0, 2}

    def test_by_name(self) -> None:
        rows = self.ROWS
        budget = ExpertBudget(BudgetMethod.OEA, k0=1)
        assert shared_experts(budget, rows, rows) == {0, 2}
        # Fillers: by sums 2 before 3, by votes 3 before 2.
        rows = ([0.5, 0.0, 0.2, 0.3], [0.5, 0.0, 0.2, 0.0], [0.5, 0.0, 0.2, 0.2])
        rows = (*rows, [0.1, 0.8, 0.09, 0.01])
        budgets = [ExpertBudget(BudgetMethod(name), experts=3) for name in ("xshare", "lynx")]
        assert shared_experts(budgets[0], rows, rows) == {0, 1, 2}
        assert shared_experts(budgets[1], rows, rows) == {0, 1, 3}
