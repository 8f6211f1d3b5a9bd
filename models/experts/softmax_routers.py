"""Routers of a transformers model that score by softmax, and other routes through them.

For work beside the serving path: recording what routers say, and trying what a policy would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SOFTMAX_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""`model_type` of the families whose routers select from a softmax over all experts."""


@dataclass(frozen=True)
class SoftmaxRouter:
    """The router of one decoder layer.

    Attributes:
        layer: of the decoder, from 0.
        module: transformers' own; gives logits (tokens, experts), weights and ids (tokens, k).
        experts: that it chooses from.
        top_k: experts per token.
        renormalize: whether the chosen weights are scaled to sum to 1.
    """

    layer: int
    module: nn.Module
    experts: int
    top_k: int
    renormalize: bool

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own choice: weights and ids, (tokens, k), from scores, (tokens, experts)."""
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids


Route = Callable[[SoftmaxRouter, Tensor], tuple[Tensor, Tensor]]
"""(router, scores (tokens, experts)) to weights and ids, (tokens, k)."""


def softmax_routers(model: Any) -> dict[int, SoftmaxRouter]:
    """The routers of a causal language model by decoder layer; dense layers have none.

    Raises:
        ValueError: the model is of another family.
    """
    kind = model.config.model_type
    if kind not in SOFTMAX_FAMILIES:
        raise ValueError(f"model type {kind!r} is none of {', '.join(SOFTMAX_FAMILIES)}")
    routers = {}
    for index, layer in enumerate(model.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            renormalize = getattr(gate, "norm_topk_prob", True)
            routers[index] = SoftmaxRouter(
                index, gate, gate.weight.size(0), gate.top_k, renormalize
            )
    return routers


@contextmanager
def rerouted(routers: Mapping[int, SoftmaxRouter], route: Route) -> Iterator[None]:
    """Let `route` choose the experts of these routers' layers.

    Scores are a softmax in fp32, or in fp64 where the model is in fp64.
    """

    def hook(router: SoftmaxRouter) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def replace(_module: Any, _arguments: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
            logits, own, _ = output
            precise = torch.promote_types(logits.dtype, torch.float32)
            weights, ids = route(router, logits.softmax(-1, dtype=precise))
            return logits, weights.to(own.dtype), ids

        return replace

    handles = [router.module.register_forward_hook(hook(router)) for router in routers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_scores(routers: Mapping[int, SoftmaxRouter]) -> Iterator[dict[int, Tensor]]:
    """Record, by layer, the scores of the last pass, (tokens, experts), without changing it."""
    scores: dict[int, Tensor] = {}

    def record(router: SoftmaxRouter, own: Tensor) -> tuple[Tensor, Tensor]:
        scores[router.layer] = own
        return router.choose(own)

    with rerouted(routers, record):
        yield scores
