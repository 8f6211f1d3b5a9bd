"""Step: experts behind behaviours that labels name."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.moe import MoeLayer, Routed, moe_layers, recorded
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.offline.intervals import LEAST_PROMPTS, SIGNIFICANCE, corrected, welch
from sluice.models.profile.expert_fields import BehaviourFields

WEIGHT, COUNT = "weight", "count"
"""An expert's activation on a token: its weight, or 1 where it is selected."""
LEAST_DIFFERENCE = 1e-3
"""Of mean activations, which lie in [0, 1]. Routers in bf16 round by as much."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Behaviour(Step):
    """Finds experts behind a behaviour: MoTE's fTRI (arXiv 2502.11096), from labelled prompts.

    An expert's activation by a prompt is the mean of its weight (or of 1 where it is selected)
    over the prompt's tokens, answers left out. Its score is the mean activation by prompts with
    the label less that by prompts with any other label, each prompt counting the same; prompts
    without a label do not count. MoTE sums over a prompt's tokens; a mean keeps long prompts from
    deciding. Whether MoTE takes weights or counts is not published, so both are to be had.

    An expert belongs to the behaviour if its score is above 0 by Welch's t-test, one-sided, with
    the p-values of all experts of the model adjusted together (Benjamini and Hochberg) and within
    `SIGNIFICANCE`, and if the score is `LEAST_DIFFERENCE` or more. Of these the first `experts` by
    score are kept; where there are none the entry has no experts and says so. Prompts are the
    samples: one that the file has twice with a label counts once, and it takes `LEAST_PROMPTS`
    on either side.
    """

    name: ClassVar[str] = "behaviour"
    help: ClassVar[str] = "experts that prompts with a label activate more than the other prompts"
    needs_experts: ClassVar[bool] = True

    label: str = option("", "names the behaviour; empty: each label that the prompts have")
    measure: str = option(WEIGHT, f"what an activation is: {WEIGHT} or {COUNT}")
    experts: int = option(10, "most experts of a behaviour")

    def refusal(self, calibration: Calibration) -> str | None:
        """Why the prompts show no behaviour; a named label that they lack is an error instead."""
        reason = super().refusal(calibration)
        if reason is None and not self.label:
            return _too_few(_labelled(calibration))
        return reason

    def run(self, calibration: Calibration) -> Part:
        """Run the labelled prompts, and look at what the routers select.

        Raises:
            CalibrationError: an option is out of range, the labels are missing, all the same or on
                too few prompts, the named one is not among them, or the model has no experts.
        """
        labelled = _labelled(calibration)
        self._check(labelled)
        layers = moe_layers(calibration.model.causal_lm)
        prompts = sorted({sample.prompt for sample, _ in labelled})
        answers = {sample.prompt: sample for sample, _ in labelled}
        by_prompt = activations(
            calibration, layers, [answers[prompt] for prompt in prompts], self.measure
        )
        # A prompt runs once: with two labels its activation is the same to the last bit.
        row = {prompt: number for number, prompt in enumerate(prompts)}
        activation = by_prompt[[row[sample.prompt] for sample, _ in labelled]]
        labels = np.array([label for _, label in labelled])
        behaviours = {}
        for name in [self.label] if self.label else sorted({*labels.tolist()}):
            behaviours[name] = self._behaviour(name, layers, activation, labels == name)
        return Part({"behaviours": behaviours})

    def _check(self, labelled: Sequence[tuple[Sample, str]]) -> None:
        if self.measure not in (WEIGHT, COUNT):
            raise CalibrationError(
                f"behaviour: measure: must be {WEIGHT} or {COUNT}, not {self.measure!r}"
            )
        if self.experts < 1:
            raise CalibrationError("behaviour: experts: must be at least 1")
        known = sorted({label for _, label in labelled})
        if self.label and known and self.label not in known:
            raise CalibrationError(
                f"behaviour: label: no prompt has {self.label!r}; they have {', '.join(known)}"
            )
        reason = _too_few(labelled, self.label)
        if reason is not None:
            raise CalibrationError(f"behaviour: {reason}")

    def _behaviour(
        self, label: str, layers: Sequence[MoeLayer], activation: Tensor, with_it: np.ndarray
    ) -> dict[str, Any]:
        """`BehaviourFields` of one label, as JSON values.

        Args:
            label: of the behaviour.
            layers: with experts.
            activation: (prompts, layers, experts).
            with_it: bool, (prompts,): those with the label.
        """
        counts = (int(with_it.sum()), int((~with_it).sum()))
        note = _sample_too_small(label, *counts)
        if note is not None:
            return self._fields(counts, [], note)
        values = activation.flatten(1).numpy()
        p_values, low, high = welch(values[with_it], values[~with_it])
        p_values = corrected(p_values)
        scores = values[with_it].mean(0) - values[~with_it].mean(0)
        shown = (p_values <= SIGNIFICANCE) & (scores >= LEAST_DIFFERENCE)
        order = [int(i) for i in np.argsort(-scores, kind="stable") if shown[i]][: self.experts]
        found = []
        for index in order:
            row, expert = divmod(index, activation.size(2))
            interval = float(low[index]), float(high[index])
            evidence = float(scores[index]), interval, float(p_values[index])
            found.append(((layers[row].layer, expert), *evidence))
        if not found:
            note = f"no expert is more active with {label!r} than without, as far as {counts[0]} "
            note += f"prompts with it and {counts[1]} without can show"
        return self._fields(counts, found, note)

    def _fields(
        self,
        prompts: tuple[int, int],
        found: Sequence[tuple[tuple[int, int], float, tuple[float, float], float]],
        note: str | None,
    ) -> dict[str, Any]:
        if note is not None:
            _LOG.warning("behaviour: %s", note)
        columns = [*zip(*found, strict=True)] or [()] * 4
        fields = {
            "experts": columns[0],
            "scores": columns[1],
            "measure": self.measure,
            "prompts": prompts,
            "intervals": columns[2],
            "p_values": columns[3],
            "note": note,
        }
        return BehaviourFields.model_validate(fields).model_dump(mode="json", exclude_none=True)


def activations(
    calibration: Calibration, layers: Sequence[MoeLayer], samples: Sequence[Sample], measure: str
) -> Tensor:
    """Mean activation over each prompt's tokens, fp64, (samples, layers, experts), on the CPU.

    Args:
        calibration: of the model.
        layers: of it, with experts.
        samples: answers are left out.
        measure: `WEIGHT` or `COUNT`.
    """
    model = calibration.model
    shape = (len(samples), len(layers), max(layer.count for layer in layers))
    found = torch.zeros(shape, dtype=torch.float64)
    row_of = {layer.layer: index for index, layer in enumerate(layers)}
    batches = list(model.batches(samples))
    with torch.no_grad():
        for places, batch in calibration.track(
            batches, "experts of labelled prompts", len(batches)
        ):

            def record(
                layer: MoeLayer,
                routed: Routed,
                places: Sequence[int] = places,
                batch: SampleBatch = batch,
            ) -> None:
                means = _prompt_means(routed, batch, layer.count, measure)
                found[list(places), row_of[layer.layer]] = means.cpu()

            with recorded(layers, record):
                final_states(model, batch)
    return found


def _prompt_means(routed: Routed, batch: SampleBatch, experts: int, measure: str) -> Tensor:
    """fp64, (samples, experts)."""
    weights = routed.weights.double()
    given = weights if measure == WEIGHT else torch.ones_like(weights)
    mine = batch.prompts.flatten()
    rows = torch.arange(len(batch.ids), device=mine.device).repeat_interleave(batch.ids.size(1))
    sums = torch.zeros(len(batch.ids), experts, dtype=torch.float64, device=mine.device)
    index = rows[mine].unsqueeze(-1).expand_as(routed.ids[mine])
    sums.index_put_((index, routed.ids[mine]), given[mine], accumulate=True)
    return sums / batch.prompts.sum(-1, keepdim=True)


def _labelled(calibration: Calibration) -> list[tuple[Sample, str]]:
    """Prompts with their labels; one that is there twice with a label counts once."""
    pairs = zip(calibration.prompts, calibration.encoded(calibration.prompts), strict=True)
    labelled = {(ids, example.label): None for example, ids in pairs if example.label is not None}
    # The answers are left out, but a batch wants some.
    return [(Sample(ids, ids[-1:]), label) for ids, label in labelled]


def _too_few(labelled: Sequence[tuple[Sample, str]], named: str = "") -> str | None:
    """Why labelled prompts cannot show a behaviour, or None.

    Args:
        labelled: prompts and their labels.
        named: the label in question; empty for any.
    """
    counts = Counter(label for _, label in labelled)
    if not counts:
        return "no prompt has a label"
    if len(counts) == 1:
        return (
            f"all labelled prompts have the label {next(iter(counts))!r}: nothing to compare with"
        )
    reasons = [
        _sample_too_small(name, count, len(labelled) - count)
        for name, count in counts.items()
        if named in ("", name)
    ]
    if None in reasons:
        return None
    if named:
        return reasons[0]
    return (
        f"no label has {LEAST_PROMPTS} different prompts with it and as many without: fewer tell "
        "nothing"
    )


def _sample_too_small(label: str, with_it: int, without: int) -> str | None:
    """Why so many prompts show no behaviour of a label, or None."""
    if min(with_it, without) >= LEAST_PROMPTS:
        return None
    return (
        f"{with_it} different prompts with {label!r} and {without} without tell nothing: it takes "
        f"{LEAST_PROMPTS} of each"
    )
