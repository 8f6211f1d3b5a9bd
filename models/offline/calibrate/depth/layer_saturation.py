"""How similar a layer's output must be to its input for the token to be settled, layer by layer.

MuE (arXiv 2211.11152) and CALM (arXiv 2207.07061) hold the cosine of the two against one
threshold; neighbouring layers of pre-norm models are alike to unlike degrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.depth.method import row_cosine
from sluice.models.offline.calibrate.depth.exit_grid import threshold_grid
from sluice.models.offline.calibrate.depth.risk_bound import RiskBound
from sluice.models.offline.calibrate.depth.training_data import likeliest
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import SampleBatch

NEVER = 1.0
"""Threshold of a layer after which no token is known to be settled."""


@dataclass(frozen=True)
class SimilarTokens:
    """Decode steps at full depth, each of one prompt.

    Attributes:
        cosines: fp32, (layers, steps), of each layer's output and input.
        agrees: bool, (layers, steps), whether the layer's likeliest token is full depth's.
        owner: int64, (steps,), prompt, from 0.
    """

    cosines: Tensor
    agrees: Tensor
    owner: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: HFModel, batch: SampleBatch, full: Tensor, places: list[int]
    ) -> SimilarTokens:
        """Run a batch at full depth.

        Args:
            model: the model.
            batch: what to run.
            full: full depth's tokens, int64, (steps,).
            places: number of each sample of the batch.
        """
        where = batch.where[batch.decoded]
        cosines, agrees = [], []

        def look(_layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> None:
            rows = after.flatten(0, 1)[where]
            cosines.append(row_cosine(rows, before.flatten(0, 1)[where]))
            agrees.append(likeliest(model, rows) == full)

        final_states(model, batch, look)
        owner = torch.tensor(places, device=where.device)[batch.owner[batch.decoded]]
        return cls(torch.stack(cosines), torch.stack(agrees), owner)

    @classmethod
    def joined(cls, parts: list[SimilarTokens]) -> SimilarTokens:
        """The steps of all parts."""
        return cls(
            torch.cat([part.cosines for part in parts], dim=1),
            torch.cat([part.agrees for part in parts], dim=1),
            torch.cat([part.owner for part in parts]),
        )

    def losses(self, layer: int, threshold: float) -> Tensor:
        """Share of a prompt's similar steps whose token is not full depth's.

        Returns:
            fp64, (prompts,), of the prompts that have a step so similar.
        """
        similar = self.cosines[layer] >= threshold
        owner = self.owner[similar]
        size = int(self.owner.max()) + 1
        steps = torch.bincount(owner, minlength=size)
        wrong = torch.bincount(owner[~self.agrees[layer][similar]], minlength=size)
        return wrong[steps > 0].double() / steps[steps > 0]


def saturation_thresholds(
    train: Tensor, owner: Tensor, held: SimilarTokens, bound: RiskBound, count: int
) -> list[float]:
    """Per layer the smallest threshold above which tokens are settled; `NEVER` without one.

    The risk of a threshold is the chance that a step which reaches it has another token than full
    depth's, averaged over a prompt's such steps; prompts that have one are the units. Each layer's
    bound holds by itself.

    Args:
        train: fp32, (layers, steps), cosines of other prompts' steps. They choose the thresholds
            and the order of the tests, which thus do not depend on what is tested.
        owner: int64, (steps,), their prompts.
        held: what is tested.
        bound: to be shown.
        count: thresholds that a layer is tried at, at most.

    Returns:
        One number a layer; `NEVER` for the last one, which no token leaves.
    """

    def tests(layer: int) -> Iterator[tuple[float, Tensor]]:
        points = train[layer : layer + 1]
        for threshold in threshold_grid(points, (layer,), len(train), count, False):
            # A test of few prompts would fail for their number alone, and end the sequence.
            prompts = len(torch.unique(owner[train[layer] >= threshold]))
            if prompts >= enough:
                yield threshold, held.losses(layer, threshold)

    enough = max(bound.least + 3 * math.sqrt(bound.least), len(torch.unique(owner)) / 2)
    found = [bound.last_shown(tests(layer)) for layer in range(len(train) - 1)]
    return [NEVER if each is None else each[0] for each in found] + [NEVER]
