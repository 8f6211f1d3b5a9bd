"""Which prompts heads are trained on, and which their thresholds are calibrated on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sluice.models.calibrate.step import Calibration
from sluice.models.experts.sample_batch import Sample


@dataclass(frozen=True)
class Halves:
    """Samples of different prompts, drawn by seed into two parts.

    A prompt that the file has twice counts once: so none is in both parts, and those of a part are
    exchangeable.

    Attributes:
        train: what is trained learns from these; of an odd number one more than the others.
        held: nothing is trained on these.
    """

    train: tuple[Sample, ...]
    held: tuple[Sample, ...]

    @classmethod
    def of(cls, calibration: Calibration) -> Halves:
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
