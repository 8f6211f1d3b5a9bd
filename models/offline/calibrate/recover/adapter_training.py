"""Trains a low-rank adapter that makes up for blocks left out of generated tokens.

The model is frozen and teaches itself: the loss is the Kullback-Leibler divergence from full
depth's distribution to the one without the blocks, mean over generated tokens of the model's own
answers, as in LayerSkip's and Kangaroo's self-distillation (arXiv 2404.16710, 2404.18911).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sluice.models.depth.stream_adapter import StreamAdapter
from sluice.models.offline.calibrate.depth.training_data import draws, row_parts
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Part, Workspace
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

_WARM_UP = 10
"""Steps in which the rate rises."""
_CLIP = 1.0
"""Largest norm of a step's gradient."""
_KEPT_EVERY = 25
"""Steps after which a stop loses nothing."""


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


@dataclass(frozen=True)
class KeptTraining:
    """Where a training is kept while it goes on.

    Attributes:
        workspace: of the calibration.
        name: of the training.
        key: of all that it depends on.
    """

    workspace: Workspace
    name: str
    key: str

    def load(self) -> tuple[int, Mapping[str, Tensor]]:
        """Steps that were done, and the tensors after them."""
        part = self.workspace.part(self.name, self.key)
        return (0, {}) if part is None else (part.fields["steps"], part.heads)

    def save(self, steps: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors after so many steps.

        Raises:
            OSError: they cannot be written.
        """
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.workspace.keep_part(self.name, self.key, Part({"steps": steps}, held))


def train(
    calibration: Calibration,
    blocks: Collection[int],
    samples: Sequence[Sample],
    training: Training,
    kept: KeptTraining,
) -> dict[int, StreamAdapter]:
    """Train the adapters of a set of blocks, by the layer after which each acts.

    Args:
        calibration: whose model it is.
        blocks: that generated tokens leave out.
        samples: with a decode step each.
        training: how.
        kept: where to go on, if it was stopped before.

    Raises:
        OSError: what was trained cannot be kept.
    """
    model = calibration.model
    adapters = _fresh(model, run_ends(blocks), training.rank, calibration.seed)
    parameters = [each for adapter in adapters.values() for each in (adapter.down, adapter.up)]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    done, tensors = kept.load()
    if done:
        _put(tensors, parameters, optimizer, done)
    left = training.steps - done
    steps = calibration.track(
        range(done, training.steps), f"adapter for {len(blocks)} blocks", left
    )
    drawn = islice(draws(samples, training.tokens, calibration.seed), done, None)
    for step, taken in zip(steps, drawn, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step, training.steps)
        batch = SampleBatch.of(taken, model.device)
        loss = divergences(model, adapters, blocks, batch).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        if (step + 1) % _KEPT_EVERY == 0 or step + 1 == training.steps:
            kept.save(step + 1, _held(parameters, optimizer))
    return {layer: StreamAdapter(a.down.detach(), a.up.detach()) for layer, a in adapters.items()}


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names that Adam has for them."""


def _held(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their moments, by name."""
    found: dict[str, Tensor] = {}
    for place, parameter in enumerate(parameters):
        moments = {f"{place}.{name}": optimizer.state[parameter][name] for name in _MOMENTS}
        found |= {f"{place}": parameter, **moments}
    return found


@torch.no_grad()
def _put(
    tensors: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> None:
    """Inverse of `_held`, after so many steps."""
    for place, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"{place}"])
        moments = {
            name: tensors[f"{place}.{name}"].to(parameter.device, copy=True) for name in _MOMENTS
        }
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


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
