"""Numbers that make tiny random models decide now one way, now the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def threshold_between(scores: Sequence[float], share: float) -> float:
    """A threshold that about `share` of the scores lie below, midway between two neighbours.

    Neighbours that nearly touch are passed over for the nearest pair that does not.

    Raises:
        ValueError: no two finite scores differ.
    """
    values = sorted(score for score in scores if math.isfinite(score))
    cuts = [
        (abs(i - share * len(values)), (low + high) / 2)
        for i, (low, high) in enumerate(pairwise(values), start=1)
        if high - low > 1e-4 * max(abs(low), abs(high))
    ]
    if not cuts:
        raise ValueError("all scores are the same")
    return min(cuts)[1]


def random_heads(states: Tensor, seed: int = 0, inner: int = 16) -> dict[str, Tensor]:
    """Every method's trained tensors, drawn so that their scores on `states` vary.

    `states` is a residual stream, (layers + 1, tokens, hidden), the embeddings first.
    """
    layers, _, hidden = states.shape
    layers -= 1
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = 1.0 / (float(states.std()) * math.sqrt(hidden))
    heads = {
        "classifier.weight": 2.0 * scale * draw(hidden),
        "classifier.bias": 0.5 * draw(1)[0],
        "first.weight": 3.0 * scale * draw(layers, hidden),
        "first.bias": 0.5 * draw(layers),
        "q_exit.0.weight": scale * draw(inner, 2 * hidden),
        "q_exit.1.weight": draw(inner, inner) / math.sqrt(inner),
        "q_exit.2.weight": 3.0 * draw(1, inner) / math.sqrt(inner),
    }
    biases = {"0": inner, "1": inner, "2": 1}
    return heads | {f"q_exit.{part}.bias": 0.1 * draw(size) for part, size in biases.items()}
