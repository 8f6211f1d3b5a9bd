"""Step: NAEE's thresholds for skipping experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration, Step
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.moe import MoeLayer, Routed, moe_layers, recorded

BINS = 1 << 16
"""Of a histogram over [0, 1]."""


@dataclass(frozen=True)
class SkipRatios(Step):
    """Finds each layer's `skip_ratio` (NAEE, arXiv 2402.14800) on prompts and full depth's answers.

    NAEE routes to two experts and drops the second if its weight is under a share of the first
    one's; that share is the median of w2 / w1 over tokens, so that half of the tokens drop it.
    `routing.experts.skip_ratio` holds every selected expert's score against the best selected
    one's, so with more experts per token the median is over all selected experts but the best:
    half of those selections are dropped. Scores are what weights are made of, without the
    correction bias. Layers without experts have 0.

    The median is that of a histogram with `BINS` bins, exact to half a bin.
    """

    name: ClassVar[str] = "skip-ratios"
    help: ClassVar[str] = "share of the best expert's score under which half of the others are"
    needs_experts: ClassVar[bool] = True
    needs_several_experts: ClassVar[bool] = True

    def run(self, calibration: Calibration) -> Part:
        """Run the samples, and look at what the routers select.

        Raises:
            CalibrationError: the model has no experts, or runs one per token.
        """
        self.check(calibration)
        model = calibration.model
        layers = moe_layers(model.causal_lm)
        counts = {
            layer.layer: torch.zeros(BINS, dtype=torch.long, device=model.device)
            for layer in layers
        }
        batches = list(model.batches(calibration.samples))
        with torch.no_grad():
            for _, batch in calibration.track(batches, "scores of experts", len(batches)):
                used = batch.used.flatten()

                def record(layer: MoeLayer, routed: Routed, used: Tensor = used) -> None:
                    counts[layer.layer] += _histogram(layer, routed, used)

                with recorded(layers, record):
                    final_states(model, batch)
        ratios = [0.0] * model.layers
        for layer, found in counts.items():
            ratios[layer] = _median(found)
        return Part({"skip_ratios": ratios})


def _histogram(layer: MoeLayer, routed: Routed, used: Tensor) -> Tensor:
    """How often each ratio occurs, int64, (BINS,)."""
    scores = layer.scores(routed.logits[used]).gather(1, routed.ids[used])
    ordered = scores.sort(dim=-1, descending=True).values
    # Where even the best score is 0 in fp32, all are alike.
    ratios = torch.where(ordered[:, :1] > 0, ordered[:, 1:] / ordered[:, :1], 1.0)
    places = (ratios * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(places.flatten(), minlength=BINS)


def _median(counts: Tensor) -> float:
    """Median of what was counted: the mean of the two middle ones where their number is even."""
    below = counts.cumsum(0)
    total = int(below[-1])
    middle = torch.tensor([(total - 1) // 2, total // 2], device=counts.device)
    bins = torch.searchsorted(below, middle, right=True)
    return float((bins.double().mean() + 0.5) / BINS)
