"""Hidden states of generated tokens at every layer: a sample of bounded size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch


@dataclass(frozen=True)
class TrainSplit:
    """Samples of different prompts, drawn by seed into two parts.

    A prompt that the file has twice counts once: so none is in both parts, and those of a part are
    exchangeable.

    Attributes:
        train: what is trained learns from these; of an odd number one more than the others.
        test: nothing is trained on these.
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @classmethod
    def of(cls, calibration: Calibration) -> TrainSplit:
        """Part the samples of a calibration that a decode step would run a token of.

        An answer of one token has none: that token comes from the prompt's last one.
        """
        different = {sample.prompt: sample for sample in calibration.samples}
        decoded = [sample for sample in different.values() if decode_steps(sample)]
        random.Random(calibration.seed).shuffle(decoded)
        middle = (len(decoded) + 1) // 2
        return cls(tuple(decoded[:middle]), tuple(decoded[middle:]))


def decode_steps(sample: Sample) -> int:
    """Tokens of a sample that a decode step would run."""
    return len(sample.answer) - 1


def draws(samples: Sequence[Sample], tokens: int, seed: int) -> Iterator[list[Sample]]:
    """Samples to fill steps with, again and again, each time in another order.

    Args:
        samples: one or more.
        tokens: of a step, padding included, if a sample is not longer.
        seed: of the orders.
    """
    rng = random.Random(seed)
    drawn: list[Sample] = []
    longest = 0
    while True:
        for sample in rng.sample(samples, len(samples)):
            length = len(sample.prompt) + len(sample.answer)
            if drawn and (len(drawn) + 1) * max(longest, length) > tokens:
                yield drawn
                drawn, longest = [], 0
            drawn, longest = [*drawn, sample], max(longest, length)


@dataclass(frozen=True)
class TokenStates:
    """Decode steps at full depth, teacher-forced.

    Attributes:
        states: (layers + 1, tokens, hidden), before the first and after every layer, in the
            model's dtype.
        owner: int64, (tokens,): place of each token's sample.
        weights: fp32, (tokens,), mean 1: all tokens of a sample, sampled or not, weigh as much as
            those of any other.
    """

    states: Tensor
    owner: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, calibration: Calibration, samples: Sequence[Sample], count: int, seed: int
    ) -> TokenStates:
        """Run samples, and keep tokens drawn by seed.

        Args:
            calibration: whose model they run through.
            samples: with a decode step each.
            count: tokens to keep, all of them if there are fewer.
            seed: of the draw.
        """
        model = calibration.model
        steps = torch.tensor([decode_steps(sample) for sample in samples])
        drawn = torch.zeros(int(steps.sum()), dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        drawn[torch.randperm(len(drawn), generator=generator)[:count]] = True
        drawn_of = torch.split(drawn, steps.tolist())

        batches = list(model.batches(samples))
        states, owner = [], []
        for places, batch in calibration.track(batches, "hidden states", len(batches)):
            kept = torch.cat([drawn_of[place] for place in places])
            if kept.any():
                where = batch.where[batch.decoded][kept.to(model.device)]
                states.append(_states(calibration, batch, where))
                belongs = torch.tensor(places).repeat_interleave(steps[places])
                owner.append(belongs[kept])
        owners = torch.cat(owner)
        weights = 1.0 / steps[owners]
        return cls(
            states=torch.cat(states, dim=1),
            owner=owners.to(model.device),
            weights=(weights / weights.mean()).to(model.device),
        )


@torch.no_grad()
def _states(calibration: Calibration, batch: SampleBatch, where: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> None:
        if layer == 0:
            found.append(before.flatten(0, 1)[where])
        found.append(after.flatten(0, 1)[where])

    final_states(calibration.model, batch, keep)
    return torch.stack(found)


LOGITS_AT_ONCE = 1 << 24
"""Logits that are held at a time."""


def row_parts(model: HFModel, rows: int) -> Iterator[slice]:
    """Rows in parts whose logits may be held at a time."""
    size = max(1, LOGITS_AT_ONCE // int(model.config.vocab_size))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def head_rows(model: HFModel, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a residual stream, (rows, hidden): rows and theirs, (part, vocabulary)."""
    for part in row_parts(model, len(states)):
        yield part, model.logits(states[part])


def likeliest(model: HFModel, states: Tensor) -> Tensor:
    """The likeliest token of each row: (rows, hidden) to int64, (rows,)."""
    tokens = torch.empty(len(states), dtype=torch.long, device=states.device)
    for part, logits in head_rows(model, states):
        tokens[part] = logits.argmax(-1)
    return tokens


def token_losses(model: HFModel, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What exits make of rows whose right tokens are known.

    Args:
        model: the model.
        states: residual stream, (rows, hidden).
        tokens: int64, (rows,).

    Returns:
        Cross-entropy of the tokens, fp32, (rows,), and whether they are the likeliest, bool.
    """
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    right = torch.empty(len(states), dtype=torch.bool, device=states.device)
    for part, logits in head_rows(model, states):
        losses[part] = nn.functional.cross_entropy(logits.float(), tokens[part], reduction="none")
        right[part] = logits.argmax(-1) == tokens[part]
    return losses, right
