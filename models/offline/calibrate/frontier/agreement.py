"""How much of full depth's own answers a setting gives back.

The agreement of an answer is the share of full depth's tokens that it gives before the first
difference; of several answers it is the mean, each counting the same. After the first difference
the two have read different texts: that a token further on is equal, or is not, says nothing about
the setting any more. Up to it both have read the same tokens, so that one teacher-forced pass over
full depth's answer finds exactly what an engine that generates freely would: the measure is the
same in `teacher_forced` and on a server. 1 means that every answer is full depth's to the last
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sluice.models.offline.hf_model.hooks import ablated, final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import SampleBatch
from sluice.models.policy.policy import SkipSet

_ROWS = 256
"""Tokens whose logits are held at a time."""


def agreement(expected: Sequence[int], given: Sequence[int]) -> float:
    """Share of `expected` that `given` begins with.

    Args:
        expected: full depth's answer, one token or more.
        given: a setting's answer.
    """
    equal = 0
    for own, other in zip(expected, given, strict=False):
        if own != other:
            break
        equal += 1
    return equal / len(expected)


@dataclass(frozen=True)
class Forced:
    """What a teacher-forced pass finds.

    Attributes:
        agreement: see the module.
        log_likelihood: of full depth's tokens, mean over those that a decode step would give.
    """

    agreement: float
    log_likelihood: float


def teacher_forced(model: HFModel, batches: Sequence[SampleBatch], skip: SkipSet) -> Forced:
    """Leave sub-layers out of generated tokens, and read full depth's answers.

    Args:
        model: the model.
        batches: prompts with full depth's answers; some answer has two tokens.
        skip: what is left out; its phase is not read.
    """
    shares: list[float] = []
    total, count = 0.0, 0
    for batch in batches:
        with torch.inference_mode(), ablated(model, skip, batch.generated):
            states = final_states(model, batch).flatten(0, 1)[batch.where]
            right: list[bool] = []
            for rows, targets, decoded in zip(
                torch.split(states, _ROWS),
                torch.split(batch.targets, _ROWS),
                torch.split(batch.decoded, _ROWS),
                strict=True,
            ):
                logits = model.logits(rows).float()
                right += (logits.argmax(-1) == targets).tolist()
                own = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                total += float(own[decoded].double().sum())
                count += int(decoded.sum())
        shares += _shares(right, batch.owner.tolist(), len(batch.last))
    return Forced(sum(shares) / len(shares), total / count)


def _shares(right: Sequence[bool], owner: Sequence[int], samples: int) -> list[float]:
    """Share of each sample's tokens before its first wrong one."""
    lengths, equal, on = [0] * samples, [0] * samples, [True] * samples
    for sample, hit in zip(owner, right, strict=True):
        lengths[sample] += 1
        on[sample] &= hit
        equal[sample] += on[sample]
    return [part / whole for part, whole in zip(equal, lengths, strict=True)]
