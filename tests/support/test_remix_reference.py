"""Re-mixing and contrast of the expert reference on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.references.experts import contrasted
from support.references.remixes import (
    ReferenceStore,
    Remixer,
    average,
    blended,
    prompt_neighbors,
    score_neighbors,
)
from support.references.routes import Router, weak_route

from sluice.models.policy.experts import Contrast, Remix, RemixMethod, RemixScope

SCORES = [0.125, 0.5, 0.0625, 0.25, 0.03125, 0.03125]
"""Experts 1, 3, 0, 2, 4, 5 from best to worst; the last two tie."""

PLAIN = Router(top_k=3, renormalize=False)


def remix(method: str = "kernel", **changes: object) -> Remix:
    settings = {"alpha": 0.5, "layers": (2, 5), "top": 2, "neighbors": 2, "kernel": "cosine"}
    return Remix(RemixMethod(method), RemixScope.LAST, **{**settings, **changes})


class TestRemix:
    def test_the_best_keep_their_mass(self) -> None:
        reference = [0.1, 0.1, 0.2, 0.6]
        # Experts 1 and 3 hold 0.75; the reference gives them 1/7 and 6/7 of it.
        mixed = blended([0.125, 0.5, 0.125, 0.25], reference, 0.5, 2)
        expected = [0.125, 0.25 + 0.375 / 7, 0.125, 0.125 + 0.375 * 6 / 7]
        assert mixed == pytest.approx(expected)
        assert blended([0.125, 0.5, 0.125, 0.25], reference, 1.0, 2) == [0.125, 0.5, 0.125, 0.25]
        assert blended([0.5, 0.5], [0.2, 0.8], 0.0, 2) == pytest.approx([0.2, 0.8])
        # Of a tie the lower expert takes part.
        assert blended([0.3, 0.3, 0.3], [0.0, 0.1, 0.9], 0.0, 2) == pytest.approx([0, 0.6, 0.3])

    def test_a_reference_of_other_experts_changes_nothing(self) -> None:
        assert blended([0.6, 0.4, 0.0], [0.0, 0.0, 1.0], 0.0, 2) == [0.6, 0.4, 0.0]

    # Around their mean (1, 1): (2, 0), (0, 2), (-2, 0), (0, -2).
    EMBEDDINGS = torch.tensor([[3.0, 1.0], [1.0, 3.0], [-1.0, 1.0], [1.0, -1.0]])

    def test_neighbours_of_a_prompt(self) -> None:
        near = prompt_neighbors(remix(), self.EMBEDDINGS, torch.tensor([5.0, 4.0]))
        assert near == [(0, pytest.approx(0.8)), (1, pytest.approx(0.6))]
        near = prompt_neighbors(remix(neighbors=3), self.EMBEDDINGS, torch.tensor([5.0, 4.0]))
        assert near[2] == (3, 0.0)
        gaussian = remix(kernel="gaussian", bandwidth=0.5)
        near = prompt_neighbors(gaussian, self.EMBEDDINGS, torch.tensor([5.0, 4.0]))
        expected = [(0, math.exp(-0.4 / 0.5)), (1, math.exp(-0.8 / 0.5))]
        assert [i for i, _ in near] == [0, 1]
        assert [w for _, w in near] == pytest.approx([w for _, w in expected])
        tied = prompt_neighbors(remix(neighbors=1), self.EMBEDDINGS, torch.tensor([2.0, 2.0]))
        assert [i for i, _ in tied] == [0]

    def test_the_leak_guard(self) -> None:
        guarded = remix(max_similarity=0.7)
        near = prompt_neighbors(guarded, self.EMBEDDINGS, torch.tensor([5.0, 4.0]))
        assert [i for i, _ in near] == [1, 3]
        exact = remix(max_similarity=1.0)
        near = prompt_neighbors(exact, self.EMBEDDINGS, torch.tensor([2.0, 1.0]))
        assert near[0] == (0, 1.0)
        assert not prompt_neighbors(
            remix(max_similarity=-1.0), self.EMBEDDINGS, torch.tensor([5.0, 4.0])
        )

    def test_neighbours_of_a_row(self) -> None:
        pathways = [[0.5, 0.5], [1.0, 0.0], [0.75, 0.25], [0.0, 1.0]]
        gaussian = remix("mode", kernel="gaussian", bandwidth=0.5)
        near = score_neighbors(gaussian, pathways, [0.75, 0.25])
        # Squares 0.125, 0.125, 0, 1.125.
        assert near == [(2, 1.0), (0, pytest.approx(math.exp(-0.25)))]
        near = score_neighbors(remix("mode"), pathways, [1.0, 0.0])
        assert near == [(1, 1.0), (2, pytest.approx(3 / math.sqrt(10)))]

    def test_average(self) -> None:
        pathways = [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
        assert average([(0, 1.0), (1, 3.0)], pathways) == [0.875, 0.125]
        assert average([(0, 0.0)], pathways) is None
        assert average([], pathways) is None

    def test_layers_and_stores(self) -> None:
        pathways = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])
        store = ReferenceStore(torch.eye(2), pathways, (2, 5))
        nearest = remix(neighbors=1, alpha=0.0)
        remixer = Remixer(nearest, store, torch.tensor([0.0, 1.0]))
        assert remixer.remixed(5, [0.75, 0.25]) == [0.0, 1.0]
        assert remixer.remixed(2, [0.75, 0.25]) == [0.5, 0.5]
        assert remixer.remixed(3, [0.75, 0.25]) == [0.75, 0.25]
        # The client's own embedding goes before the model's.
        own = Remixer(remix(neighbors=1, alpha=0.0, embedding=(1.0, 0.0)), store, torch.ones(7))
        assert own.remixed(5, [0.75, 0.25]) == [1.0, 0.0]
        mode = Remixer(remix("mode", neighbors=1, alpha=0.0), store, torch.ones(2))
        assert mode.remixed(5, [0.75, 0.25]) == [1.0, 0.0]
        supplied = remix(
            "supplied", neighbors=None, kernel=None, pathway=((1.0, 3.0), (0.0, 1.0)), alpha=0.0
        )
        assert Remixer(supplied, None, torch.ones(2)).remixed(2, [0.5, 0.5]) == [0.25, 0.75]


class TestContrast:
    def test_the_weak_expert(self) -> None:
        assert weak_route(SCORES, PLAIN, 0).weights == {1: 1.0}
        assert weak_route(SCORES, PLAIN, 2).weights == {0: 1.0}
        assert weak_route(SCORES, Router(2, scale=2.5), 5).weights == {5: 2.5}
        corrected = Router(2, correction=(0.0, 0.0, 0.5, 0.0, 0.0, 0.0))
        assert weak_route(SCORES, corrected, 0).weights == {2: 1.0}
        limited = Router(2, groups=3, topk_group=1)
        assert weak_route(SCORES, limited, 1).weights == {0: 1.0}
        with pytest.raises(IndexError):
            weak_route(SCORES, limited, 2)

    def test_logits(self) -> None:
        strong = torch.tensor([2.0, 1.0, 2.0 + math.log(0.1) + 1e-3, 2.0 + math.log(0.1) - 1e-3])
        weak = torch.tensor([1.0, -4.0, 0.0, -9.0])
        mixed = contrasted(strong, weak, Contrast(1, beta=0.5, alpha=0.1))
        assert mixed[:2].tolist() == [2.5, 3.5]
        assert mixed[2] > -math.inf
        assert mixed[3] == -math.inf
