"""Step: what each layer and sub-layer does to the residual stream."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sluice.models.depth.method import row_cosine
from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import BATCH_TOKENS, HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

FEWEST_TOKENS = 3
"""Of a text: one that always runs, one that a layer is left out of, one after it."""

_SMALLEST_NORM = 1e-6
"""What a change is divided by at least, as in the authors' code."""


def future_effect(model: HFModel, sample: Sample, last: int) -> Tensor:
    """Effect of each layer on one text.

    For layer s: the largest |d_l - d'_l| / |d_l| over layers l > s and tokens after `last`. d_l is
    what layer l adds to the stream at full depth, and d'_l what it adds where layer s is left out
    of tokens 1 to `last`: its output is its input there, which later layers' keys and values come
    from. The last layer's effect is 0.

    The text runs in the same passes with nothing left out and with one layer each, so nothing of
    full depth's has to be kept, and both are rounded alike.

    Args:
        model: the model.
        sample: the text, prompt and answer.
        last: in 1 to the text's length - 2.

    Returns:
        fp32, (layers,), on the CPU.
    """
    length = len(sample.prompt) + len(sample.answer)
    room = max(1, BATCH_TOKENS // length - 1)
    starts = range(0, model.layers, room)
    parts = [
        _effects(model, sample, last, range(start, min(start + room, model.layers)))
        for start in starts
    ]
    return torch.cat(parts).cpu()


def _effects(model: HFModel, sample: Sample, last: int, layers: range) -> Tensor:
    """Effects of adjacent layers, fp32, (layers,): row 0 runs all, row i + 1 not the i-th."""
    batch = SampleBatch.of([sample] * (1 + len(layers)), model.device)
    effects = torch.zeros(len(layers), device=model.device)

    def watch(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> Tensor | None:
        earlier = min(max(layer - layers.start, 0), len(layers))
        if earlier:
            added = (after[: 1 + earlier, last + 1 :] - before[: 1 + earlier, last + 1 :]).float()
            change = (added[1:] - added[0]).norm(dim=-1)
            change = change / added[0].norm(dim=-1).clamp_min(_SMALLEST_NORM)
            effects[:earlier] = torch.maximum(effects[:earlier], change.amax(-1))
        if layer not in layers:
            return None
        given = after.clone()
        row = 1 + layer - layers.start
        given[row, 1 : last + 1] = before[row, 1 : last + 1]
        return given

    final_states(model, batch, watch)
    return effects


LIMIT = 1.0
"""z-score above which a weight counts."""


def outlier_share(block: nn.Module) -> float:
    """Share of a block's weights whose z-score, over all of its weights, is above `LIMIT`.

    Weights are those of its linear maps, routed experts and router included; norms, biases and
    other vectors are left out. The z-score is signed, with the deviation of the whole population.
    Sums are taken in fp64; one matrix at a time is converted.
    """
    count = sum(matrix.numel() for matrix in _matrices(block))
    mean = _total(matrix.double().sum() for matrix in _matrices(block)) / count
    spread = _total((matrix.double() - mean).square().sum() for matrix in _matrices(block))
    limit = mean + LIMIT * (spread / count) ** 0.5
    return _total((matrix.double() > limit).sum() for matrix in _matrices(block)) / count


def _matrices(block: nn.Module) -> Iterator[Tensor]:
    for name, parameter in block.named_parameters():
        # Biases of all experts of a layer are a matrix in gpt-oss.
        if parameter.dim() > 1 and not name.endswith("bias"):
            yield from parameter.detach().flatten(0, -3) if parameter.dim() > 2 else [parameter]


def _total(parts: Iterator[Tensor]) -> float:
    return float(torch.stack([part.double() for part in parts]).sum())


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

    `zd` needs no text, see `sluice.models.offline.calibrate.depth.importance`; `future_effect` is
    taken on some of the texts, see `sluice.models.offline.calibrate.depth.importance`.
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
        model = calibration.model
        batches = list(model.batches(calibration.samples))
        change = _Change(model)
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
            "zd": [outlier_share(block) for block in model.blocks],
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
        effects = torch.zeros(calibration.model.layers)
        with torch.no_grad():
            for sample, last in calibration.track(drawn, "effect on later tokens", len(drawn)):
                effects = torch.maximum(effects, future_effect(calibration.model, sample, last))
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

    def __init__(self, model: HFModel) -> None:
        self._model = model
        width = len(_COSINES) + len(_NORMS)
        self._sums = torch.zeros(model.layers, width, dtype=torch.float64, device=model.device)
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

        final_states(self._model, batch, watch)
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
