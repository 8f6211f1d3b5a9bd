"""Step: what each layer and sub-layer does to the residual stream."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sluice.models.depth.method import row_cosine
from sluice.models.offline.calibrate.depth.order_evidence import UNITS, order_evidence
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

_LOG = logging.getLogger(__name__)

_COSINES = ("block", "attention", "mlp", "turn")
_NORMS = UNITS


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

    `zd` needs no text, see `outlier_share`; `future_effect` is taken on some of the texts, see
    there.

    `importance_evidence` says how sure the order is, see `order_evidence`. Something has to be left
    out first: where two layers cannot be told apart, the order stands as measured and a note says
    so.
    """

    name: ClassVar[str] = "importance"
    help: ClassVar[str] = "what each layer, attention and MLP does to the residual stream"

    future_prompts: int = option(
        10, "texts, drawn by seed, that the effect on later tokens is measured on"
    )
    future_positions: int = option(4, "places in each of them up to which a layer is left out")

    def passes(self, calibration: Calibration) -> float:
        """See `Step.passes`."""
        prompts = max(len(calibration.prompts), 1)
        effects = min(self.future_prompts, prompts) * self.future_positions
        return 1 + effects * (1 + calibration.model.layers) / prompts

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
        change = _Change(model, calibration.samples)
        with torch.no_grad():
            for places, batch in calibration.track(batches, "importance of layers", len(batches)):
                change.add(places, batch)
        cosine, norm = change.means()
        importance = {name: [1.0 - c for c in cosine[name]] for name in _NORMS}
        metrics = {
            "contribution": norm,
            "turn": cosine["turn"],
            "future_effect": self._future_effect(calibration),
            "lim": [-c for c in cosine["block"]],
            "zd": [outlier_share(block) for block in model.blocks],
        }
        evidence = order_evidence(importance, *change.by_prompt())
        for note in evidence.notes:
            _LOG.warning("importance: %s", note)
        return Part(
            {
                "importance": importance,
                "importance_evidence": evidence.model_dump(mode="json", exclude_none=True),
                "layer_metrics": metrics,
            }
        )

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
    """Sums of cosines and relative norms over each sample's tokens."""

    def __init__(self, model: HFModel, samples: Sequence[Sample]) -> None:
        self._model, self._samples = model, samples
        shape = (len(samples), model.layers, len(_COSINES) + len(_NORMS))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=model.device)
        self._tokens = torch.zeros(len(samples), dtype=torch.float64, device=model.device)

    def add(self, places: Sequence[int], batch: SampleBatch) -> None:
        samples = torch.tensor(places, device=self._model.device)
        tokens = batch.used.sum(-1)
        owner = samples.repeat_interleave(tokens)

        def watch(layer: int, *states: Tensor) -> None:
            before, middle, after = (state[batch.used].float() for state in states)
            steps = ((before, after), (before, middle), (middle, after))
            cosines = [row_cosine(then, now) for now, then in steps]
            cosines.append(row_cosine(after - before, before))
            norms = [
                (then - now).norm(dim=-1) / now.norm(dim=-1).clamp_min(_SMALLEST)
                for now, then in steps
            ]
            changes = torch.stack([*cosines, *norms], dim=-1).double()
            self._sums[:, layer].index_add_(0, owner, changes)

        final_states(self._model, batch, watch)
        self._tokens[samples] = tokens.double()

    def means(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Cosines and relative norms, one number a layer."""
        means = self._sums.sum(0) / self._tokens.sum()
        columns = [_finite(column) for column in means.unbind(-1)]
        cosines = dict(zip(_COSINES, columns, strict=False))
        return cosines, dict(zip(_NORMS, columns[len(_COSINES) :], strict=True))

    def by_prompt(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each different prompt: sums of 1 - cos, (prompts, layers, 3), and tokens, (prompts,).

        The three are those of `_NORMS`.
        """
        prompts = {sample.prompt: 0 for sample in self._samples}
        number = {prompt: index for index, prompt in enumerate(prompts)}
        index = torch.tensor([number[sample.prompt] for sample in self._samples])
        cosines = self._sums[..., : len(_NORMS)].cpu()
        tokens = self._tokens.cpu()
        sums = torch.zeros(len(prompts), *cosines.shape[1:], dtype=torch.float64)
        sums.index_add_(0, index, tokens[:, None, None] - cosines)
        counts = torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, index, tokens)
        return sums.numpy(), counts.numpy()


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
