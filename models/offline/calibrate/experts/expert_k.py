"""Step: LExI's experts per token of each layer, under budgets."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.offline.hf_model.moe import MoeLayer, moe_layers
from sluice.models.offline.intervals import SIGNIFICANCE, corrected, mean_above, mean_interval
from sluice.models.profile.expert_fields import ExpertBudgetLevel

_LEAST_DRAWS = 2
_LOG = logging.getLogger(__name__)
_Table = NDArray[np.float64]


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

    Draws of noise are the samples: Student's interval of the divergence is over them. Whether a
    list is better than as many experts spread evenly is Student's one-sided t-test of the two
    divergences on as many fresh draws, since those that chose the list flatter it, with the
    p-values of all budgets adjusted together (Benjamini and Hochberg). It takes two draws. A list
    that is not shown to be better is kept, and a note says so.
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
        # The first half chooses, the other tests.
        draws = [
            torch.randn(self.tokens, model.hidden, generator=noise).to(
                model.device, model.causal_lm.dtype
            )
            for _ in range(2 * self.draws)
        ]
        tracked = calibration.track(layers, "experts per token", len(layers))
        with torch.no_grad():
            table = np.stack([divergences(layer, draws) for layer in tracked], axis=1)
        chooses, tests = np.split(table, 2)
        lists = [cheapest(chooses.mean(0), budget) for budget in budgets]
        p_values = self._p_values(tests, [chosen for chosen, _ in lists], budgets)
        levels = []
        for budget, (chosen, divergence) in zip(budgets, lists, strict=True):
            top_k = [layers[0].spec.top_k] * model.layers
            for layer, k in zip(layers, chosen, strict=True):
                top_k[layer.layer] = k
            level = ExpertBudgetLevel(
                budget=budget,
                top_k=tuple(top_k),
                divergence=divergence,
                **self._evidence(budget, _sums(chooses, chosen), p_values.get(budget)),
            )
            if level.note is not None:
                _LOG.warning("expert-k: budget %d: %s", budget, level.note)
            levels.append(level.model_dump(mode="json", exclude_none=True))
        return Part({"expert_k": levels})

    def _p_values(
        self, tests: _Table, lists: Sequence[Sequence[int]], budgets: Sequence[int]
    ) -> dict[int, float]:
        """Of each list that is not the even one being better than that, by budget."""
        if self.draws < _LEAST_DRAWS:
            return {}
        raw = {}
        for chosen, budget in zip(lists, budgets, strict=True):
            even = evenly_spread(budget, len(chosen))
            if even != tuple(chosen):
                raw[budget] = mean_above(_sums(tests, even) - _sums(tests, chosen))
        return dict(zip(raw, corrected([*raw.values()]).tolist(), strict=True))

    def _evidence(self, budget: int, sums: _Table, p_value: float | None) -> dict[str, Any]:
        """Fields of a level that say how sure it is.

        Args:
            budget: of the level.
            sums: divergence of its list on each draw, (draws,).
            p_value: of its being better than the even list, or None.
        """
        if self.draws < _LEAST_DRAWS:
            note = f"one draw of noise tells nothing about lists: it takes {_LEAST_DRAWS}"
            return {"note": note}
        low, high = mean_interval(sums)
        found: dict[str, Any] = {"interval": (float(low), float(high)), "p_value": p_value}
        if p_value is not None and p_value > SIGNIFICANCE:
            found["note"] = (
                f"{self.draws} draws of noise do not show that this list changes outputs less than "
                f"{budget} experts spread evenly"
            )
        return found

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


def evenly_spread(budget: int, layers: int) -> tuple[int, ...]:
    """Experts per token of each layer, alike but for what does not divide."""
    more = spaced_indices(budget % layers, layers)
    return tuple(budget // layers + (layer in more) for layer in range(layers))


def _sums(table: _Table, top_k: Sequence[int]) -> _Table:
    """Divergence of a list on each draw, (draws,), of a table (draws, layers, k)."""
    found: _Table = table[:, range(len(top_k)), [k - 1 for k in top_k]].sum(-1)
    return found


def divergences(layer: MoeLayer, draws: Sequence[Tensor]) -> _Table:
    """|MoE_k(X) - MoE_k0(X)|_F by draw and k, (draws, k0); the last k is the layer's own, of 0.

    A layer with fewer experts per token selects the first of those it selects with more, so each
    selected expert runs once.

    Args:
        layer: with experts.
        draws: of noise, (tokens, hidden), in the model's dtype.

    Raises:
        CalibrationError: an output is not finite.
    """
    top_k = layer.spec.top_k
    found = np.zeros((len(draws), top_k))
    for draw, states in enumerate(draws):
        scores, ids = layer.ranked(layer.router(states)[0], top_k)
        outputs = [output.float() for output in layer.outputs(states, ids)]
        mixed = [_mixed(layer, scores[:, :k], outputs) for k in range(1, top_k + 1)]
        found[draw] = [float((output - mixed[-1]).double().norm()) for output in mixed]
    if not np.isfinite(found).all():
        raise CalibrationError(
            f"expert-k: layer {layer.layer}: its output on noise is not finite; "
            "a wider type of the weights may help"
        )
    return found


def cheapest(
    table: Sequence[Sequence[float]] | _Table, budget: int
) -> tuple[tuple[int, ...], float]:
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
    return chosen, float(cost)


def _mixed(layer: MoeLayer, scores: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Outputs of the first experts with the weights they have together, fp32, (tokens, hidden)."""
    weights = layer.weights(scores).unbind(-1)
    total = torch.zeros_like(outputs[0])
    for weight, output in zip(weights, outputs, strict=False):
        total += weight.unsqueeze(-1) * output
    return total
