"""Hidden states of generated tokens at every layer: a sample of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.calibrate.halves import decode_steps
from sluice.models.calibrate.passes import final_states
from sluice.models.calibrate.step import Calibration
from sluice.models.experts.sample_batch import Sample, SampleBatch


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
        subject = calibration.subject
        steps = torch.tensor([decode_steps(sample) for sample in samples])
        drawn = torch.zeros(int(steps.sum()), dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        drawn[torch.randperm(len(drawn), generator=generator)[:count]] = True
        drawn_of = torch.split(drawn, steps.tolist())

        batches = list(subject.batches(samples))
        states, owner = [], []
        for places, batch in calibration.track(batches, "hidden states", len(batches)):
            kept = torch.cat([drawn_of[place] for place in places])
            if kept.any():
                where = batch.where[batch.decoded][kept.to(subject.device)]
                states.append(_states(calibration, batch, where))
                belongs = torch.tensor(places).repeat_interleave(steps[places])
                owner.append(belongs[kept])
        owners = torch.cat(owner)
        weights = 1.0 / steps[owners]
        return cls(
            states=torch.cat(states, dim=1),
            owner=owners.to(subject.device),
            weights=(weights / weights.mean()).to(subject.device),
        )


@torch.no_grad()
def _states(calibration: Calibration, batch: SampleBatch, where: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> None:
        if layer == 0:
            found.append(before.flatten(0, 1)[where])
        found.append(after.flatten(0, 1)[where])

    final_states(calibration.subject, batch, keep)
    return torch.stack(found)
