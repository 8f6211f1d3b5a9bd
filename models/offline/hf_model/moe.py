"""Mixture-of-experts layers of a transformers model of any family, with their parts by name.

In transformers a layer's router gives (logits, weights, ids) in every family, and its experts take
(states, ids, weights); what differs is where the router is and how it scores and selects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sluice.kernels.ops.router_scores import best, plain_scores, selection_scores
from sluice.kernels.ops.routing_args import RouterSpec
from sluice.models.offline.hf_model.examples import CalibrationError


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """A decoder layer's routed experts. Shared experts are no part of it.

    Attributes:
        layer: of the decoder, from 0.
        router: transformers' own; gives logits, (tokens, experts), weights and ids, (tokens, k).
        experts: transformers' own; takes states, (tokens, hidden), ids and weights.
        count: routed experts.
        spec: how the router selects.
    """

    layer: int
    router: nn.Module
    experts: nn.Module
    count: int
    spec: RouterSpec

    def scores(self, logits: Tensor) -> Tensor:
        """Scores that weights are made of, fp32, (tokens, experts)."""
        return plain_scores(logits, self.spec.sigmoid)

    def ranked(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Scores and ids of the `count` experts that are selected first, (tokens, count)."""
        scores = self.scores(logits)
        ids = best(selection_scores(scores, self.spec.to(scores.device)), count)[1]
        return scores.gather(1, ids), ids

    def weights(self, scores: Tensor) -> Tensor:
        """Weights of experts that are selected together, from their scores, (tokens, count)."""
        if self.spec.renormalize:
            scores = scores / scores.sum(-1, keepdim=True)
        return scores * self.spec.scale

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids, (tokens, k), of the experts with the best scores, (tokens, experts).

        It is the model's own choice where neither a correction nor a group limit has a say.
        """
        best_scores, ids = scores.topk(self.spec.top_k, dim=-1)
        return self.weights(best_scores), ids

    def outputs(self, states: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """What experts give before their weight.

        Args:
            states: (tokens, hidden), as the router gets them.
            ids: int64, (tokens, k).

        Yields:
            (tokens, hidden), one for each of the `k` columns.
        """
        one = torch.ones(len(states), 1, dtype=states.dtype, device=states.device)
        for column in ids.unbind(-1):
            yield self.experts(states, column.unsqueeze(-1), one)


@dataclass(frozen=True)
class Routed:
    """What a router was given and what it said.

    Attributes:
        states: (tokens, hidden).
        logits: (tokens, experts).
        weights: (tokens, k).
        ids: int64, (tokens, k).
    """

    states: Tensor
    logits: Tensor
    weights: Tensor
    ids: Tensor


def moe_layers(model: Any) -> tuple[MoeLayer, ...]:
    """The layers of a causal language model that have routed experts, ascending.

    Raises:
        CalibrationError: there are none.
    """
    found = []
    for index, block in enumerate(model.model.layers):
        experts = getattr(block.mlp, "experts", None)
        if experts is not None:
            # The name that gpt-oss has for it, and that of all others.
            router = getattr(block.mlp, "router", None) or block.mlp.gate
            count = router.weight.size(0)
            found.append(MoeLayer(index, router, experts, count, _spec(model.config, router)))
    if not found:
        raise CalibrationError(f"{model.config.model_type} has no mixture-of-experts layers")
    return tuple(found)


@contextmanager
def recorded(
    layers: Sequence[MoeLayer], record: Callable[[MoeLayer, Routed], None]
) -> Iterator[None]:
    """Call `record` for each of these layers in the passes within, which it does not change."""

    def hook(layer: MoeLayer) -> Callable[..., None]:
        def after(_module: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            logits, weights, ids = output
            record(layer, Routed(arguments[0].flatten(0, -2), logits, weights, ids))

        return after

    handles = [layer.router.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spec(config: Any, router: Any) -> RouterSpec:
    top_k = router.top_k
    match config.model_type:
        case "mixtral" | "gpt_oss":
            return RouterSpec(top_k)
        case "olmoe" | "qwen2_moe" | "qwen3_moe":
            return RouterSpec(top_k, renormalize=bool(router.norm_topk_prob))
        case "deepseek_v2":
            limited = router.topk_method == "group_limited_greedy"
            return RouterSpec(
                top_k,
                renormalize=False,
                scale=router.routed_scaling_factor,
                groups=router.num_group if limited else 1,
                topk_group=router.topk_group if limited else 1,
            )
        case "deepseek_v3":
            return RouterSpec(
                top_k,
                scoring="sigmoid",
                renormalize=bool(router.norm_topk_prob),
                scale=router.routed_scaling_factor,
                groups=router.num_group,
                topk_group=router.topk_group,
                correction=router.e_score_correction_bias.detach().float(),
            )
    raise CalibrationError(f"no router known for {config.model_type}")


SOFTMAX_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""`model_type` of the families whose routers select from a softmax over all experts."""


Route = Callable[[MoeLayer, Tensor], tuple[Tensor, Tensor]]
"""(layer, scores (tokens, experts)) to weights and ids, (tokens, k)."""


def softmax_routers(model: Any) -> dict[int, MoeLayer]:
    """The layers with routed experts of a causal language model by decoder layer.

    Raises:
        CalibrationError: the model is of another family, or has no such layers.
    """
    kind = model.config.model_type
    if kind not in SOFTMAX_FAMILIES:
        raise CalibrationError(f"model type {kind!r} is none of {', '.join(SOFTMAX_FAMILIES)}")
    return {layer.layer: layer for layer in moe_layers(model)}


@contextmanager
def rerouted(routers: Mapping[int, MoeLayer], route: Route) -> Iterator[None]:
    """Let `route` choose the experts of these routers' layers.

    Scores are a softmax in fp32, or in fp64 where the model is in fp64.
    """

    def hook(layer: MoeLayer) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def replace(_module: Any, _arguments: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
            logits, own, _ = output
            precise = torch.promote_types(logits.dtype, torch.float32)
            weights, ids = route(layer, logits.softmax(-1, dtype=precise))
            return logits, weights.to(own.dtype), ids

        return replace

    handles = [layer.router.register_forward_hook(hook(layer)) for layer in routers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_scores(routers: Mapping[int, MoeLayer]) -> Iterator[dict[int, Tensor]]:
    """Record, by layer, the scores of the last pass, (tokens, experts), without changing it."""
    scores: dict[int, Tensor] = {}

    def record(layer: MoeLayer, plain: Tensor) -> tuple[Tensor, Tensor]:
        scores[layer.layer] = plain
        return layer.choose(plain)

    with rerouted(routers, record):
        yield scores
