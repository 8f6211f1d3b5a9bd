"""C3PO's re-mixing of router scores, written from the paper (arXiv 2504.07964)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.policy.experts import Remix, RemixMethod

from .routes import ordered

Neighbors = list[tuple[int, float]]
"""Reference and its weight."""


@dataclass(frozen=True)
class ReferenceStore:
    """References of one set.

    Attributes:
        embeddings: of their prompts, (references, width).
        pathways: router scores of their last tokens, (references, layers held, experts).
        layers: decoder layers held, ascending.
    """

    embeddings: Tensor
    pathways: Tensor
    layers: tuple[int, ...]

    def pathway(self, reference: int, layer: int) -> list[float]:
        """Scores of one reference in one decoder layer."""
        row: list[float] = self.pathways[reference, self.layers.index(layer)].tolist()
        return row


class Remixer:
    """One request's re-mixing."""

    def __init__(self, remix: Remix, store: ReferenceStore | None, embedding: Tensor) -> None:
        """`embedding` is the model's own of the prompt, (width,)."""
        assert (store is None) == (remix.method is RemixMethod.SUPPLIED)
        assert remix.max_similarity is None or remix.method is RemixMethod.KERNEL
        self.remix, self._store = remix, store
        self._neighbors: Neighbors = []
        if remix.method is RemixMethod.KERNEL:
            assert store is not None
            if remix.embedding is not None:
                embedding = torch.tensor(remix.embedding)
            self._neighbors = prompt_neighbors(remix, store.embeddings, embedding)

    def remixed(self, layer: int, scores: list[float]) -> list[float]:
        """A row's scores after re-mixing."""
        if layer not in self.remix.layers:
            return scores
        reference = self._reference(layer, scores)
        if reference is None:
            return scores
        return blended(scores, reference, self.remix.alpha, self.remix.top)

    def _reference(self, layer: int, scores: list[float]) -> list[float] | None:
        if self.remix.method is RemixMethod.SUPPLIED:
            assert self.remix.pathway is not None
            return list(self.remix.pathway[self.remix.layers.index(layer)])
        assert self._store is not None
        count = len(self._store.pathways)
        pathways = [self._store.pathway(i, layer) for i in range(count)]
        neighbors = self._neighbors
        if self.remix.method is RemixMethod.MODE:
            neighbors = score_neighbors(self.remix, pathways, scores)
        return average(neighbors, pathways)


def prompt_neighbors(remix: Remix, embeddings: Tensor, embedding: Tensor) -> Neighbors:
    """References whose prompts are most like this one, nearest first."""
    center = embeddings.mean(dim=0)
    cosines = [
        _cosine((row - center).tolist(), (embedding - center).tolist()) for row in embeddings
    ]
    limit = math.inf if remix.max_similarity is None else remix.max_similarity
    allowed = [i for i, cosine in enumerate(cosines) if not cosine > limit]
    nearest = sorted(allowed, key=lambda i: (-cosines[i], i))[: remix.neighbors]
    if remix.kernel == "cosine":
        return [(i, max(cosines[i], 0.0)) for i in nearest]
    return [(i, _gaussian(2.0 - 2.0 * cosines[i], remix)) for i in nearest]


def score_neighbors(
    remix: Remix, pathways: Sequence[Sequence[float]], scores: Sequence[float]
) -> Neighbors:
    """References whose scores in a layer are nearest to the row's own, nearest first."""
    squares = [
        sum((own - other) ** 2 for own, other in zip(scores, pathway, strict=True))
        for pathway in pathways
    ]
    nearest = sorted(range(len(squares)), key=lambda i: (squares[i], i))[: remix.neighbors]
    if remix.kernel == "cosine":
        return [(i, max(_cosine(scores, pathways[i]), 0.0)) for i in nearest]
    return [(i, _gaussian(squares[i], remix)) for i in nearest]


def average(neighbors: Neighbors, pathways: Sequence[Sequence[float]]) -> list[float] | None:
    """Weighted mean of the neighbours' scores in a layer; None if nobody has a weight."""
    total = sum(weight for _, weight in neighbors)
    if total == 0.0:
        return None
    experts = range(len(pathways[0]))
    return [sum(weight * pathways[i][e] for i, weight in neighbors) / total for e in experts]


def blended(
    scores: Sequence[float], reference: Sequence[float], alpha: float, top: int
) -> list[float]:
    """Mix `reference` into the `top` best scores, which keep their sum."""
    taking_part = ordered(scores)[:top]
    mass = sum(scores[expert] for expert in taking_part)
    other = sum(reference[expert] for expert in taking_part)
    mixed = list(scores)
    if other == 0.0:
        return mixed
    for expert in taking_part:
        share = reference[expert] * mass / other
        mixed[expert] = alpha * scores[expert] + (1.0 - alpha) * share
    return mixed


def _gaussian(square: float, remix: Remix) -> float:
    assert remix.kernel == "gaussian"
    assert remix.bandwidth is not None
    return math.exp(-square / (2.0 * remix.bandwidth**2))


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """0 where one of them is the origin."""
    length = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0
