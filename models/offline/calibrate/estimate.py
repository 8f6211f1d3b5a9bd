"""How long a calibration will take: a few passes are timed, and the steps say how many they are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sluice.models.offline.calibrate.step import Calibration, Step
from sluice.models.offline.hf_model.examples import spaced_indices
from sluice.models.offline.hf_model.hooks import continued, final_states
from sluice.models.offline.hf_model.samples import Sample

_TRIED = 4
"""Prompts that are timed."""
_START = {"compiled": 90.0, "eager": 20.0}
"""Seconds that an engine takes to start; what it compiles is nearly all of it."""
ANSWERS = "answers"


@dataclass(frozen=True)
class Pace:
    """What was timed.

    Attributes:
        read: seconds of a pass over all prompts and their answers.
        answer: seconds of one answer, which a small batch of an engine takes as well.
        answers: seconds of all answers, one prompt after the other.
    """

    read: float
    answer: float
    answers: float

    @classmethod
    def of(cls, calibration: Calibration) -> Pace:
        """Time a pass and an answer, with a prompt or two to warm up."""
        model, prompts = calibration.model, [*calibration.encoded(calibration.prompts)]
        chosen = [prompts[place] for place in spaced_indices(_TRIED, len(prompts))]
        tokens = min(calibration.new_tokens, 8)
        for _ in continued(model, chosen[:1], 2):
            pass
        began = time.perf_counter()
        for _ in continued(model, chosen[:1], tokens):
            pass
        answer = (time.perf_counter() - began) * calibration.new_tokens / tokens
        # What an answer's tokens are does not matter for the time.
        samples = [Sample(prompt, prompt[-1:] * calibration.new_tokens) for prompt in chosen]
        began = time.perf_counter()
        with torch.inference_mode():
            for _, batch in model.batches(samples):
                final_states(model, batch)
        read = (time.perf_counter() - began) * len(prompts) / len(chosen)
        lengths = len({*map(len, prompts)})
        return cls(read, answer, answer * lengths)


def estimate(calibration: Calibration, steps: Sequence[Step]) -> dict[str, float]:
    """Seconds that the answers and each step will take, roughly; those that are done take none.

    Args:
        calibration: whose prompts they read.
        steps: in order.
    """
    pace = Pace.of(calibration)
    found = {ANSWERS: pace.answers}
    for step in steps:
        start = _START["eager" if calibration.eager else "compiled"] if step.measures_speed else 0.0
        reading = step.passes(calibration) * pace.read
        found[step.name] = reading + step.timed_batches(calibration) * pace.answer + start
    return found


def in_words(seconds: Mapping[str, float]) -> str:
    """An estimate, as a sentence."""
    parts = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items())
    return f"this takes about {duration(sum(seconds.values()))} on a quiet machine ({parts})"


def duration(seconds: float) -> str:
    """Seconds in words, as exact as a guess is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{round(minutes)} min" if minutes < 90 else f"{minutes / 60:.1f} h"
