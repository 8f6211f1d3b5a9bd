"""Step: experts behind behaviours that labels name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.moe import MoeLayer, Routed, moe_layers, recorded
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

WEIGHT, COUNT = "weight", "count"
"""An expert's activation on a token: its weight, or 1 where it is selected."""


@dataclass(frozen=True)
class Behaviour(Step):
    """Finds experts behind a behaviour: MoTE's fTRI (arXiv 2502.11096), from labelled prompts.

    An expert's activation by a prompt is the mean of its weight (or of 1 where it is selected)
    over the prompt's tokens, answers left out. Its score is the mean activation by prompts with
    the label less that by prompts with any other label, each prompt counting the same; prompts
    without a label do not count. MoTE sums over a prompt's tokens; a mean keeps long prompts from
    deciding. Whether MoTE takes weights or counts is not published, so both are to be had. Of the
    experts whose score is above 0, the first `experts` are kept.
    """

    name: ClassVar[str] = "behaviour"
    help: ClassVar[str] = "experts that prompts with a label activate more than the other prompts"
    needs_experts: ClassVar[bool] = True

    label: str = option("", "names the behaviour; empty: each label that the prompts have")
    measure: str = option(WEIGHT, f"what an activation is: {WEIGHT} or {COUNT}")
    experts: int = option(10, "most experts of a behaviour")

    def refusal(self, calibration: Calibration) -> str | None:
        """Why the prompts show no behaviour; a named label that they lack is an error instead."""
        found = super().refusal(calibration)
        if found is None and not self.label:
            return _one_class(_labels(calibration))
        return found

    def run(self, calibration: Calibration) -> Part:
        """Run the labelled prompts, and look at what the routers select.

        Raises:
            CalibrationError: an option is out of range, the labels are missing or all the same,
                the named one is not among them, no expert tells a behaviour, or the model has no
                experts.
        """
        labels = _labels(calibration)
        self._check(labels)
        layers = moe_layers(calibration.model.causal_lm)
        pairs = zip(calibration.samples, labels, strict=True)
        samples = [sample for sample, label in pairs if label is not None]
        activation = activations(calibration, layers, samples, self.measure)
        given = [label for label in labels if label is not None]
        named = [self.label] if self.label else sorted({*given})
        return Part(
            {
                "behaviours": {
                    label: self._found(label, layers, activation, given) for label in named
                }
            }
        )

    def _check(self, labels: Sequence[str | None]) -> None:
        if self.measure not in (WEIGHT, COUNT):
            raise CalibrationError(
                f"behaviour: measure: must be {WEIGHT} or {COUNT}, not {self.measure!r}"
            )
        if self.experts < 1:
            raise CalibrationError("behaviour: experts: must be at least 1")
        known = sorted({label for label in labels if label is not None})
        if self.label and known and self.label not in known:
            raise CalibrationError(
                f"behaviour: label: no prompt has {self.label!r}; they have {', '.join(known)}"
            )
        reason = _one_class(labels)
        if reason is not None:
            raise CalibrationError(f"behaviour: {reason}")

    def _found(
        self, label: str, layers: Sequence[MoeLayer], activation: Tensor, given: Sequence[str]
    ) -> dict[str, Any]:
        """`BehaviourFields` of one label."""
        with_it = torch.tensor([each == label for each in given])
        scores = activation[with_it].mean(0) - activation[~with_it].mean(0)
        order = scores.flatten().argsort(descending=True, stable=True)[: self.experts].tolist()
        ranked = [divmod(place, scores.size(1)) for place in order]
        ranked = [(row, expert) for row, expert in ranked if scores[row, expert] > 0]
        if not ranked:
            raise CalibrationError(
                f"behaviour: no expert is more active with {label!r} than without"
            )
        return {
            "experts": [[layers[row].layer, expert] for row, expert in ranked],
            "scores": [float(scores[row, expert]) for row, expert in ranked],
            "measure": self.measure,
            "prompts": [int(with_it.sum()), int((~with_it).sum())],
        }


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


def _labels(calibration: Calibration) -> list[str | None]:
    return [example.label for example in calibration.prompts]


def _one_class(labels: Sequence[str | None]) -> str | None:
    """Why labels tell nothing apart, or None."""
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        return "no prompt has a label"
    if len(counts) == 1:
        return (
            f"all labelled prompts have the label {next(iter(counts))!r}: nothing to compare with"
        )
    return None
