"""Trains a low-rank adapter that makes up for blocks left out of generated tokens.

The model is frozen and teaches itself: the loss is the Kullback-Leibler divergence from full
depth's distribution to the one without the blocks, mean over generated tokens of the model's own
answers, as in LayerSkip's and Kangaroo's self-distillation (arXiv 2404.16710, 2404.18911).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sluice.models.depth.stream_adapter import StreamAdapter
from sluice.models.offline.calibrate.depth.training_data import draws, row_parts
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

_WARM_UP = 10
"""Steps in which the rate rises."""
_CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True)
class Training:
    """How an adapter is trained.

    Attributes:
        rank: of its maps.
        steps: of Adam.
        tokens: of a step, padding included.
        learning_rate: peak; it decays to zero along a cosine.
    """

    rank: int
    steps: int
    tokens: int
    learning_rate: float


def run_ends(blocks: Collection[int]) -> tuple[int, ...]:
    """The last block of each run of adjacent ones, ascending: an adapter acts after each."""
    return tuple(block for block in sorted(blocks) if block + 1 not in blocks)


def train(
    calibration: Calibration,
    blocks: Collection[int],
    samples: Sequence[Sample],
    training: Training,
) -> dict[int, StreamAdapter]:
    """Train the adapters of a set of blocks, by the layer after which each acts.

    Args:
        calibration: whose model it is.
        blocks: that generated tokens leave out.
        samples: with a decode step each.
        training: how.
    """
    model = calibration.model
    adapters = _fresh(model, run_ends(blocks), training.rank, calibration.seed)
    parameters = [each for adapter in adapters.values() for each in (adapter.down, adapter.up)]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, training.steps)
    )
    steps = calibration.track(
        range(training.steps), f"adapter for {len(blocks)} blocks", training.steps
    )
    drawn = draws(samples, training.tokens, calibration.seed)
    for _, taken in zip(steps, drawn, strict=False):
        batch = SampleBatch.of(taken, model.device)
        loss = divergences(model, adapters, blocks, batch).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
    return {layer: StreamAdapter(a.down.detach(), a.up.detach()) for layer, a in adapters.items()}


def divergences(
    model: HFModel,
    adapters: Mapping[int, StreamAdapter],
    blocks: Collection[int],
    batch: SampleBatch,
) -> Tensor:
    """Divergence from full depth of each token that a decode step would give, nats, (tokens,)."""
    places = batch.where[batch.decoded]
    with torch.no_grad():
        full = final_states(model, batch).flatten(0, 1)[places]
    own = shallow_states(model, adapters, blocks, batch).flatten(0, 1)[places]
    return torch.cat(
        [
            checkpoint(_row_divergence, model, full[part], own[part], use_reentrant=False)
            for part in row_parts(model, len(places))
        ]
    )


def shallow_states(
    model: HFModel,
    adapters: Mapping[int, StreamAdapter],
    blocks: Collection[int],
    batch: SampleBatch,
) -> Tensor:
    """The last residual stream, (rows, tokens, hidden), of generated tokens without the blocks."""
    generated = batch.generated.unsqueeze(-1)

    def leave_out(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> Tensor | None:
        if layer not in blocks:
            return None
        adapter = adapters.get(layer)
        return torch.where(generated, before if adapter is None else adapter(before), after)

    return final_states(model, batch, leave_out)


def divergence(expected: Tensor, given: Tensor) -> Tensor:
    """Kullback-Leibler divergence of logits, (tokens, vocabulary), nats, fp32, (tokens,)."""
    own, other = expected.float().log_softmax(-1), given.float().log_softmax(-1)
    return (own.exp() * (own - other)).sum(-1)


def _row_divergence(model: HFModel, full: Tensor, own: Tensor) -> Tensor:
    return divergence(model.logits(full), model.logits(own))


def _fresh(model: HFModel, layers: Sequence[int], rank: int, seed: int) -> dict[int, StreamAdapter]:
    """Adapters that add nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        down = torch.randn(rank, model.hidden, generator=generator) / math.sqrt(model.hidden)
        up = torch.zeros(model.hidden, rank)
        found[layer] = StreamAdapter(
            *(each.to(model.device).requires_grad_() for each in (down, up))
        )
    return found


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate."""
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
