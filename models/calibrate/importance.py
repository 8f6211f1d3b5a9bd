"""Step: what each layer and sub-layer does to the residual stream."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sluice.models.calibrate.examples import CalibrationError
from sluice.models.calibrate.future_effect import FEWEST_TOKENS, future_effect
from sluice.models.calibrate.passes import final_states
from sluice.models.calibrate.step import Calibration, Step, option
from sluice.models.calibrate.subject import Subject
from sluice.models.calibrate.weight_outliers import outlier_share
from sluice.models.calibrate.workspace import Part
from sluice.models.depth.method import row_cosine
from sluice.models.experts.sample_batch import Sample, SampleBatch

_SMALLEST = 1e-12
"""What a contribution divides by at least."""
_COSINES = ("block", "attention", "mlp", "turn")
_NORMS = ("block", "attention", "mlp")


@dataclass(frozen=True)
class Importance(Step):
    """Measures layers on each prompt and full depth's own answer to it.

    With h_{l-1} the stream before layer l, m_l that between its attention and its MLP, and h_l that
    after it, means over all tokens of prompts and answers, each token counting the same:

    - `importance`: 1 - cos(h_{l-1}, h_l) of blocks, 1 - cos(h_{l-1}, m_l) of attention and
      1 - cos(m_l, h_l) of MLPs (LLM-Drop, arXiv 2406.15786);
    - `contribution`: |h_l - h_{l-1}| / |h_{l-1}|, |m_l - h_{l-1}| / |h_{l-1}| and
      |h_l - m_l| / |m_l|, and `turn`: cos(h_l - h_{l-1}, h_{l-1}) (arXiv 2505.13898);
    - `lim`: -cos(h_{l-1}, h_l) (arXiv 2406.17415).

    `zd` needs no text, see `sluice.models.calibrate.weight_outliers`; `future_effect` is taken on
    some of the texts, see `sluice.models.calibrate.future_effect`.
    """

    name: ClassVar[str] = "importance"
    help: ClassVar[str] = "what each layer, attention and MLP does to the residual stream"

    future_prompts: int = option(
        10, "texts, drawn by seed, that the effect on later tokens is measured on"
    )
    future_positions: int = option(4, "places in each of them up to which a layer is left out")

    def run(self, calibration: Calibration) -> Part:
        """Measure.

        Raises:
            CalibrationError: an option is below 1, no text has `FEWEST_TOKENS`, or the residual
                stream is not finite.
        """
        for name in ("future_prompts", "future_positions"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"importance: {name}: must be at least 1")
        subject = calibration.subject
        batches = list(subject.batches(calibration.samples))
        change = _Change(subject)
        with torch.no_grad():
            for _, batch in calibration.track(batches, "importance of layers", len(batches)):
                change.add(batch)
        cosine, norm = change.means()
        importance = {name: [1.0 - c for c in cosine[name]] for name in _NORMS}
        metrics = {
            "contribution": norm,
            "turn": cosine["turn"],
            "future_effect": self._future_effect(calibration),
            "lim": [-c for c in cosine["block"]],
            "zd": [outlier_share(block) for block in subject.blocks],
        }
        return Part({"importance": importance, "layer_metrics": metrics})

    def _future_effect(self, calibration: Calibration) -> list[float]:
        """Largest effect of each layer."""
        drawn = drawn_places(
            calibration.samples, self.future_prompts, self.future_positions, calibration.seed
        )
        if not drawn:
            raise CalibrationError(
                f"importance: no prompt has {FEWEST_TOKENS} tokens with its answer, which the "
                "effect on later tokens needs"
            )
        effects = torch.zeros(calibration.subject.layers)
        with torch.no_grad():
            for sample, last in calibration.track(drawn, "effect on later tokens", len(drawn)):
                effects = torch.maximum(effects, future_effect(calibration.subject, sample, last))
        return _finite(effects)


def drawn_places(
    samples: Sequence[Sample], texts: int, places: int, seed: int
) -> list[tuple[Sample, int]]:
    """Texts and, for each, last tokens that a layer is left out of: neither first nor last one."""
    rng = random.Random(seed)
    lengths = [len(sample.prompt) + len(sample.answer) for sample in samples]
    able = [index for index, length in enumerate(lengths) if length >= FEWEST_TOKENS]
    drawn = []
    for index in rng.sample(able, min(texts, len(able))):
        inner = range(1, lengths[index] - 1)
        lasts = sorted(rng.sample(inner, min(places, len(inner))))
        drawn += [(samples[index], last) for last in lasts]
    return drawn


class _Change:
    """Sums of cosines and relative norms over tokens; one batch of states at a time."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        width = len(_COSINES) + len(_NORMS)
        self._sums = torch.zeros(subject.layers, width, dtype=torch.float64, device=subject.device)
        self._tokens = 0

    def add(self, batch: SampleBatch) -> None:
        def watch(layer: int, *states: Tensor) -> None:
            before, middle, after = (state[batch.used].float() for state in states)
            steps = ((before, after), (before, middle), (middle, after))
            cosines = [row_cosine(then, now) for now, then in steps]
            cosines.append(row_cosine(after - before, before))
            norms = [
                (then - now).norm(dim=-1) / now.norm(dim=-1).clamp_min(_SMALLEST)
                for now, then in steps
            ]
            self._sums[layer] += torch.stack([*cosines, *norms]).double().sum(-1)

        final_states(self._subject, batch, watch)
        self._tokens += int(batch.used.sum())

    def means(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Cosines and relative norms, one number a layer."""
        columns = [_finite(column) for column in (self._sums / self._tokens).unbind(-1)]
        cosines = dict(zip(_COSINES, columns, strict=False))
        return cosines, dict(zip(_NORMS, columns[len(_COSINES) :], strict=True))


def _finite(values: Tensor) -> list[float]:
    """Numbers, one a layer.

    Raises:
        CalibrationError: one is not finite.
    """
    numbers: list[float] = values.tolist()
    for layer, number in enumerate(numbers):
        if not math.isfinite(number):
            raise CalibrationError(
                f"importance: layer {layer}: the residual stream is not finite; "
                "a wider type of the weights may help"
            )
    return numbers
