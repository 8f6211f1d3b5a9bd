"""C3PO's gradient form (NGD, arXiv 2504.07964), ahead of time and through transformers.

A prompt's pathway is the router probabilities of its last token in the critical layers. It is moved
so that the prompt's neighbours, samples with known answers, are answered better when their own last
prompt tokens take it. Weights stay frozen. What comes out is what a request supplies as
`routing.experts.remix.pathway`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sluice.models.offline.hf_model.moe import (
    MoeLayer,
    recorded_scores,
    rerouted,
    softmax_routers,
)
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.experts import REMIX_TOP

DEFAULT_STEPS = 10
FIRST_RATE = 1e-2
LAST_RATE = 1e-5


@dataclass(frozen=True)
class Neighbour:
    """A sample near the prompt; `weight` is the kernel of their embeddings, > 0."""

    sample: Sample
    weight: float


@dataclass(frozen=True)
class OptimisedPathway:
    """What the search found and what it cost.

    Attributes:
        layers: critical layers, ascending.
        start: fp32, (layers, experts): the prompt's own pathway.
        pathway: fp32, (layers, experts).
        losses: of the neighbours, before every step and after the last.
        forward_passes: of the model, that of the prompt itself included.
        backward_passes: likewise.
        pass_tokens: tokens of each pass over the neighbours, padding included.
        seconds: wall time.
    """

    layers: tuple[int, ...]
    start: Tensor
    pathway: Tensor
    losses: tuple[float, ...]
    forward_passes: int
    backward_passes: int
    pass_tokens: int
    seconds: float


def optimise_pathway(
    model: Any,
    prompt: Sequence[int],
    neighbours: Sequence[Neighbour],
    layers: Sequence[int],
    *,
    steps: int = DEFAULT_STEPS,
    first_rate: float = FIRST_RATE,
    last_rate: float = LAST_RATE,
    top: int = REMIX_TOP,
) -> OptimisedPathway:
    """Descend the neighbours' loss with Adam, the rate falling along a cosine.

    Args:
        model: causal language model of a family with softmax routers, in evaluation mode; its
            weights need no gradients and get none.
        prompt: token ids, as the server gets them.
        neighbours: of the prompt, best without the prompt itself.
        layers: critical layers, those with experts only.
        steps: at least 1.
        first_rate: learning rate of the first step.
        last_rate: that of a step after the last.
        top: most probable experts of the prompt's own pathway that move, layer by layer. They keep
            their total; the others keep their probabilities.

    Raises:
        ValueError: another family, a layer without experts, no neighbour, or a number out of range.
    """
    if steps < 1 or top < 1:
        raise ValueError(f"steps and top are at least 1, not {steps} and {top}")
    started = time.monotonic()
    routers = critical_routers(model, layers)
    batch = neighbour_batch(neighbours, model.device)
    weights = torch.tensor([each.weight for each in neighbours], device=model.device)
    start = own_pathway(model, prompt, routers)
    movable = torch.zeros_like(start, dtype=torch.bool)
    movable.scatter_(1, start.topk(min(top, start.size(1)), dim=-1).indices, True)
    values = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=first_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=last_rate)
    losses = []
    for _ in range(steps):
        loss = neighbour_loss(model, batch, weights, routers, _kept(values, start, movable))
        (values.grad,) = torch.autograd.grad(loss, values)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        pathway = _kept(values, start, movable)
        losses.append(float(neighbour_loss(model, batch, weights, routers, pathway)))
    return OptimisedPathway(
        layers=tuple(routers),
        start=start,
        pathway=pathway,
        losses=tuple(losses),
        forward_passes=steps + 2,
        backward_passes=steps,
        pass_tokens=batch.ids.numel(),
        seconds=time.monotonic() - started,
    )


def critical_routers(model: Any, layers: Sequence[int]) -> dict[int, MoeLayer]:
    """The routers of some layers, ascending.

    Raises:
        ValueError: another family, no layer, or a layer without experts.
    """
    routers = softmax_routers(model)
    strange = [layer for layer in layers if layer not in routers]
    if strange or not layers:
        raise ValueError(f"layers {list(layers)}: those with experts are {list(routers)}")
    return {layer: routers[layer] for layer in sorted(set(layers))}


def neighbour_batch(neighbours: Sequence[Neighbour], device: torch.device) -> SampleBatch:
    """The neighbours' samples, one pass together.

    Raises:
        ValueError: there is none, or a weight that is not positive.
    """
    if not neighbours or min(each.weight for each in neighbours) <= 0:
        raise ValueError("a prompt needs neighbours, with positive weights")
    return SampleBatch.of([each.sample for each in neighbours], device)


@torch.no_grad()
def own_pathway(model: Any, prompt: Sequence[int], routers: dict[int, MoeLayer]) -> Tensor:
    """A prompt's own pathway, (layers, experts), in fp32 or the model's better precision."""
    with recorded_scores(routers) as scores:
        model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
    return torch.stack([scores[layer][-1] for layer in routers])


def neighbour_loss(
    model: Any,
    batch: SampleBatch,
    weights: Tensor,
    routers: dict[int, MoeLayer],
    pathway: Tensor,
) -> Tensor:
    """Mean cross-entropy of the neighbours' answers when their last prompt tokens take a pathway.

    Args:
        model: the model.
        batch: the neighbours.
        weights: of each, (neighbours,).
        routers: of the critical layers, ascending.
        pathway: (layers, experts); the loss is differentiable in it where the choice of experts
            does not change.

    Returns:
        (): each neighbour's mean over its answer tokens, weighed.
    """
    with pathway_taken(routers, batch.last, pathway):
        logits = batch.answer_logits(model)
    each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    sums = torch.zeros(len(weights), dtype=each.dtype, device=each.device)
    sums = sums.index_add(0, batch.owner, each)
    means = sums / torch.bincount(batch.owner, minlength=len(weights))
    shares = weights.to(means.dtype)
    return (means * shares).sum() / shares.sum()


def pathway_taken(routers: dict[int, MoeLayer], places: Tensor, pathway: Tensor) -> Any:
    """Context in which the tokens at `places` are routed by `pathway`, as a pass counts them.

    Args:
        routers: of the critical layers, ascending.
        places: int64, (tokens,), counted over all rows.
        pathway: (layers, experts).
    """
    rows = dict(zip(routers, pathway, strict=True))

    def route(router: MoeLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
        own = rows[router.layer].to(scores.dtype).expand(len(places), -1)
        return router.choose(scores.index_copy(0, places, own))

    return rerouted(routers, route)


def _kept(values: Tensor, start: Tensor, movable: Tensor) -> Tensor:
    """Movable entries as probabilities of the same total, the others as they were."""
    moved = values.clamp(min=0.0).masked_fill(~movable, 0.0)
    mass = start.masked_fill(~movable, 0.0).sum(-1, keepdim=True)
    moved = moved / moved.sum(-1, keepdim=True) * mass
    return torch.where(movable, moved, start)
