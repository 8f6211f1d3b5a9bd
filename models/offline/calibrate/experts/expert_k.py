"""Step: LExI's experts per token of each layer, under budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.moe import MoeLayer, moe_layers


@dataclass(frozen=True)
class ExpertK(Step):
    """Chooses `routing.experts.top_k` per layer without data (LExI, arXiv 2509.02753).

    D_l(k) is the mean over draws of |MoE_k(X) - MoE_k0(X)|_F, where X is Gaussian noise,
    (tokens, hidden), the same for all layers, MoE_k is layer l with k experts per token, and k0 is
    the model's own number. Shared experts are in both and fall out. Of all k_l in 1 to k0 whose
    sum is the budget, those with the smallest sum of D_l(k_l) are taken. LExI searches for them by
    evolution; as the sum has one term a layer, dynamic programming finds the smallest of all in
    layers * budget * k0 steps, which no search over the same k_l can be better than.

    Dense layers have k0, which the list of the policy wants to be a valid number.
    """

    name: ClassVar[str] = "expert-k"
    help: ClassVar[str] = "experts per token of each layer under budgets"
    needs_experts: ClassVar[bool] = True
    needs_several_experts: ClassVar[bool] = True

    shares: str = option("0.875,0.75,0.625,0.5", "of the model's own experts per token: budgets")
    tokens: int = option(512, "of noise in a draw")
    draws: int = option(4, "of noise")

    def run(self, calibration: Calibration) -> Part:
        """Measure every layer, and choose.

        Raises:
            CalibrationError: an option is out of range, a budget is below one expert a layer, or
                the model has no experts, runs one per token or gives no finite output.
        """
        self.check(calibration)
        for name in ("tokens", "draws"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"expert-k: {name}: must be at least 1")
        model = calibration.model
        layers = moe_layers(model.causal_lm)
        budgets = self.budgets(layers)
        noise = torch.Generator().manual_seed(calibration.seed)
        draws = [
            torch.randn(self.tokens, model.hidden, generator=noise).to(
                model.device, model.causal_lm.dtype
            )
            for _ in range(self.draws)
        ]
        tracked = calibration.track(layers, "experts per token", len(layers))
        with torch.no_grad():
            table = [divergences(layer, draws) for layer in tracked]
        levels = []
        for budget in budgets:
            chosen, divergence = cheapest(table, budget)
            top_k = [layers[0].spec.top_k] * model.layers
            for layer, k in zip(layers, chosen, strict=True):
                top_k[layer.layer] = k
            levels.append({"budget": budget, "top_k": top_k, "divergence": divergence})
        return Part({"expert_k": levels})

    def budgets(self, layers: Sequence[MoeLayer]) -> list[int]:
        """Sums of `top_k` over these layers, descending, each once.

        Raises:
            CalibrationError: `shares` are no numbers in (0, 1], or too small for a layer to have
                one expert.
        """
        full = sum(layer.spec.top_k for layer in layers)
        found = set()
        for part in self.shares.split(","):
            try:
                share = float(part)
            except ValueError:
                raise CalibrationError(f"expert-k: shares: {part!r} is no number") from None
            if not 0 < share <= 1:
                raise CalibrationError(f"expert-k: shares: {part} is not in (0, 1]")
            budget = round(share * full)
            if budget < len(layers):
                raise CalibrationError(
                    f"expert-k: shares: {part} of {full} experts per token leaves {budget} for "
                    f"{len(layers)} layers; each needs one"
                )
            found.add(budget)
        return sorted(found, reverse=True)


def divergences(layer: MoeLayer, draws: Sequence[Tensor]) -> list[float]:
    """D_l(k) for k from 1 to the layer's own number, whose entry is 0.

    A layer with fewer experts per token selects the first of those it selects with more, so each
    selected expert runs once.

    Args:
        layer: with experts.
        draws: of noise, (tokens, hidden), in the model's dtype.

    Raises:
        CalibrationError: an output is not finite.
    """
    top_k = layer.spec.top_k
    sums = [0.0] * top_k
    for states in draws:
        scores, ids = layer.ranked(layer.router(states)[0], top_k)
        outputs = [output.float() for output in layer.outputs(states, ids)]
        mixed = [_mixed(layer, scores[:, :k], outputs) for k in range(1, top_k + 1)]
        for place, output in enumerate(mixed):
            sums[place] += float((output - mixed[-1]).double().norm())
    if not all(map(math.isfinite, sums)):
        raise CalibrationError(
            f"expert-k: layer {layer.layer}: its output on noise is not finite; "
            "a wider type of the weights may help"
        )
    return [total / len(draws) for total in sums]


def cheapest(table: Sequence[Sequence[float]], budget: int) -> tuple[tuple[int, ...], float]:
    """The k of each layer whose divergences have the smallest sum.

    Args:
        table: divergence of each layer with 1, 2, ... experts per token.
        budget: sum of k over layers, in reach: from one expert a layer to all of the table.

    Returns:
        k by layer, and the sum.
    """
    # By experts spent so far: the smallest sum, and the k that give it.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in table:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, chosen) in best.items():
            for k, divergence in enumerate(row, 1):
                way = (cost + divergence, (*chosen, k))
                if spent + k <= budget and way < longer.get(spent + k, (math.inf, ())):
                    longer[spent + k] = way
        best = longer
    cost, chosen = best[budget]
    return chosen, cost


def _mixed(layer: MoeLayer, scores: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Outputs of the first experts with the weights they have together, fp32, (tokens, hidden)."""
    weights = layer.weights(scores).unbind(-1)
    total = torch.zeros_like(outputs[0])
    for weight, output in zip(weights, outputs, strict=False):
        total += weight.unsqueeze(-1) * output
    return total
