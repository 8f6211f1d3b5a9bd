"""Masks that a prompt decides, written from the papers.

Sources: FiRST (arXiv 2410.12513), Void in Language Models (arXiv 2505.14467), LLM-Drop (arXiv
2406.15786), Mixture-of-Depths (arXiv 2404.02258) with p-MoD's schedule (arXiv 2412.04449).

`states` is the residual stream of the prompt: (layers + 1, tokens, hidden), the embeddings first.
Each function gives what is decided and how close the closest decision was (`margin`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from sluice.models.policy.policy import AdaptiveRule

Mask = tuple[frozenset[int], float]


def first_probability(layer: int, states: Tensor, heads: Mapping[str, Tensor]) -> float:
    """FiRST's router of one layer on its input, (tokens, hidden), logits averaged over tokens."""
    weight, bias = heads["first.weight"][layer], heads["first.bias"][layer]
    logits = [float(torch.dot(weight, state) + bias) for state in states]
    return 1.0 / (1.0 + math.exp(-sum(logits) / len(logits)))


def mean_cosines(states: Tensor) -> list[float]:
    """Cosine of input and output of each block, averaged over tokens."""
    cosines = torch.nn.functional.cosine_similarity(states[:-1], states[1:], dim=-1)
    return [float(layer.double().mean()) for layer in cosines]


def similar_blocks(cosines: list[float], rule: AdaptiveRule) -> Mask:
    """Blocks left out by `similarity`."""
    if rule.get("threshold") is not None:
        threshold = rule.number("threshold")
        mask = frozenset(i for i, cosine in enumerate(cosines) if cosine >= threshold)
        return mask, min(abs(cosine - threshold) for cosine in cosines)
    count = math.floor(len(cosines) * (1.0 - rule.number("budget")) + 0.5)
    order = sorted(range(len(cosines)), key=lambda i: (cosines[i], i), reverse=True)
    gone, kept = order[:count], order[count:]
    margin = cosines[gone[-1]] - cosines[kept[0]] if gone and kept else math.inf
    return frozenset(gone), margin


def lac_ranges(states: Tensor) -> list[tuple[float, float]]:
    """LAC's change of the norm and its range over earlier layers, per layer, for the last token."""
    norms = [float(torch.linalg.vector_norm(state[-1])) for state in states]
    changes = [after - before for before, after in pairwise(norms)]
    ranges = [0.0] + [max(changes[:i]) - min(changes[:i]) for i in range(1, len(changes))]
    return list(zip(changes, ranges, strict=True))


def void_blocks(states: Tensor, rule: AdaptiveRule) -> Mask:
    """Blocks left out by `lac` in mode `predict`."""
    gaps = [change - rule.number("threshold") * reach for change, reach in lac_ranges(states)]
    return frozenset(i for i, gap in enumerate(gaps) if gap < 0.0), min(map(abs, gaps))


class VoidWalk:
    """LAC token by token through the layers, for the modes that act on each of them."""

    def __init__(self, alpha: float, embeddings: Tensor) -> None:
        self._alpha = alpha
        self._changes: list[Tensor] = []
        self.gaps: list[Tensor] = []
        """`D_l - alpha R_l` per layer, (tokens,); below zero the layer is void."""
        self.active = embeddings
        """Output of each token's latest layer that is not void, (tokens, hidden)."""

    def void(self, before: Tensor, after: Tensor) -> Tensor:
        """Which tokens find the next layer void: bool, (tokens,)."""
        change = torch.linalg.vector_norm(after, dim=-1) - torch.linalg.vector_norm(before, dim=-1)
        reach = torch.zeros_like(change)
        if self._changes:
            seen = torch.stack(self._changes)
            reach = seen.amax(dim=0) - seen.amin(dim=0)
        self._changes.append(change)
        self.gaps.append(change - self._alpha * reach)
        void = self.gaps[-1] < 0.0
        self.active = torch.where(void[:, None], self.active, after)
        return void


def mod_tokens(
    embeddings: Tensor, layers: int, retention: tuple[float, ...] | None
) -> list[frozenset[int]]:
    """Prompt tokens that each layer runs under `mod`, from the embeddings (tokens, hidden)."""
    tokens = len(embeddings)
    mean = embeddings.mean(dim=0)
    importance = [
        1.0 - float(torch.nn.functional.cosine_similarity(row, mean, dim=0)) for row in embeddings
    ]
    ranked = sorted(range(tokens), key=lambda i: (i == tokens - 1, importance[i], i), reverse=True)
    shares = retention or tuple(cosine_share(i, layers) for i in range(layers))
    return [frozenset(ranked[: max(1, math.floor(share * tokens))]) for share in shares]


def cosine_share(layer: int, layers: int) -> float:
    """p-MoD's share of tokens that a layer runs."""
    # A half or a quarter, but for rounding, must not lose a token.
    share = round(0.5 * math.cos(math.pi * layer / max(layers - 1, 1)) + 0.5, 12)
    return 1.0 if share > 0.85 else max(share, 0.15)
