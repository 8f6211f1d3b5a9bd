"""Mixture-of-Depths: each layer runs only a share of the prompt's tokens.

Source of the form: Mixture-of-Depths (arXiv 2404.02258); of the schedule: p-MoD (arXiv 2412.04449):
layer l keeps the share `cos(pi l / (L - 1)) / 2 + 1/2` of the tokens, layers above 0.85 keep all,
no layer keeps less than 0.15. Their trained routers are replaced by a training-free measure:

Importance of a prompt token is one minus the cosine of its embedding with the mean embedding of
the prompt: tokens that stand out stay. It depends on the prompt's tokens alone, so chunked
prefill, preemption and neighbours cannot change it. Of equally important tokens the later is
kept, and the last token, which answers, always is. Passed-over tokens fill the layer's K/V from
the hidden state that passed it by; positions stay what they were; generated tokens run all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.method import ParameterError, PromptTokenMethod, row_cosine
from sluice.models.depth.parameters import LayerShares
from sluice.models.policy.policy import AdaptiveRule

if TYPE_CHECKING:
    from torch import Tensor

_DENSE_ABOVE = 0.85
_FLOOR = 0.15


class MixtureOfDepths(PromptTokenMethod):
    """Each layer keeps a share of the prompt's tokens, the most important ones."""

    name = "mod"
    description = "each layer reads the most important prompt tokens only"
    source = "Mixture-of-Depths (arXiv 2404.02258), schedule of p-MoD (arXiv 2412.04449)"
    parameters = {"retention": LayerShares()}

    def default_shares(self, num_layers: int) -> tuple[float, ...]:
        """See `DepthMethod.default_shares`."""
        return cosine_retention(num_layers)

    def check(self, rule: AdaptiveRule, num_layers: int) -> None:
        """Some layer must pass over some token."""
        if all(share == 1.0 for share in self._retention(rule, num_layers)):
            raise ParameterError(
                "retention", "every layer would keep every token: there is nothing to do"
            )

    def kept_tokens(
        self, embeddings: Tensor, rule: AdaptiveRule, num_layers: int
    ) -> NDArray[np.bool_]:
        """See `PromptTokenMethod.kept_tokens`."""
        return kept_tokens(importance(embeddings), self._retention(rule, num_layers))

    def _retention(self, rule: AdaptiveRule, num_layers: int) -> tuple[float, ...]:
        return rule.numbers("retention") or cosine_retention(num_layers)


def cosine_retention(num_layers: int) -> tuple[float, ...]:
    """p-MoD's share of prompt tokens per layer, (layers,)."""
    depth = np.arange(num_layers) / max(num_layers - 1, 1)
    share = np.maximum(np.cos(np.pi * depth) / 2 + 0.5, _FLOOR)
    share[share > _DENSE_ABOVE] = 1.0
    return tuple(float(value) for value in share)


def importance(embeddings: Tensor) -> NDArray[np.float32]:
    """Importance of each prompt token, (tokens,), from its embeddings, (tokens, hidden)."""
    mean = embeddings.float().mean(dim=0, keepdim=True)
    away = 1.0 - row_cosine(embeddings, mean.expand_as(embeddings))
    result: NDArray[np.float32] = away.cpu().numpy()
    return result


def kept_tokens(
    importances: NDArray[np.float32], retention: tuple[float, ...]
) -> NDArray[np.bool_]:
    """Which tokens each layer runs, bool, (tokens, layers).

    Layer l keeps `max(1, floor(retention[l] * tokens))` of them.
    """
    tokens = len(importances)
    order = np.lexsort((np.arange(tokens), importances))[::-1]
    order = np.concatenate([[tokens - 1], order[order != tokens - 1]])
    rank = np.empty(tokens, dtype=np.int64)
    rank[order] = np.arange(tokens)
    counts = np.maximum(1, np.floor(np.array(retention) * tokens)).astype(np.int64)
    kept: NDArray[np.bool_] = rank[:, np.newaxis] < counts
    return kept
