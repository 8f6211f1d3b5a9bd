"""How sure the order of layers by importance is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip_order import Unit, drop_order
from sluice.models.offline.intervals import (
    LEAST_PROMPTS,
    SIGNIFICANCE,
    corrected,
    mean_above,
    mean_interval,
    ratio_residuals,
)
from sluice.models.profile.layer_fields import ImportanceEvidence, UnitEvidence

UNITS = ("block", "attention", "mlp")


def order_evidence(
    importance: Mapping[str, Sequence[float]],
    sums: NDArray[np.float64],
    tokens: NDArray[np.float64],
) -> ImportanceEvidence:
    """Intervals of the importance of layers, and which layers its order can tell apart.

    Prompts are the samples, each as often as the file has it. Intervals are Student's, of the mean
    over tokens as a ratio of sums (`ratio_residuals`). Whether a layer is more important than the
    one before it in the order is Student's t-test of the differences of the two on the same
    prompts, with the p-values of all such pairs adjusted together (Benjamini and Hochberg). Fewer
    than `LEAST_PROMPTS` different prompts have neither.

    Args:
        importance: by kind of unit, one number a layer.
        sums: over each prompt's tokens, (prompts, layers, kinds).
        tokens: of each prompt, (prompts,).
    """
    prompts, layers, _ = sums.shape
    if prompts < LEAST_PROMPTS:
        note = f"{prompts} different prompts do not show how sure the order of layers is: it takes "
        return ImportanceEvidence(prompts=prompts, notes=(f"{note}{LEAST_PROMPTS}",))
    residuals = ratio_residuals(sums, tokens)
    orders, p_values = {}, []
    for kind, name in enumerate(importance):
        unit = Unit(name)
        order = [layer for _, layer in drop_order(unit, layers, {unit: tuple(importance[name])})]
        orders[name] = order
        p_values += [
            mean_above(residuals[:, more, kind] - residuals[:, less, kind])
            for less, more in pairwise(order)
        ]
    adjusted = corrected(p_values).reshape(len(orders), layers - 1)
    low, high = mean_interval(residuals)
    units: dict[str, UnitEvidence] = {}
    notes = []
    for kind, (name, order) in enumerate(orders.items()):
        units[name] = UnitEvidence(
            intervals=tuple(zip(low[:, kind].tolist(), high[:, kind].tolist(), strict=True)),
            order=tuple(order),
            p_values=tuple(adjusted[kind].tolist()),
        )
        alike = [
            f"{less} and {more}"
            for (less, more), p in zip(pairwise(order), adjusted[kind], strict=True)
            if p > SIGNIFICANCE
        ]
        if alike:
            notes.append(
                f"{prompts} prompts do not show which {name} is less important: layers "
                f"{', '.join(alike)}"
            )
    return ImportanceEvidence(prompts=prompts, **units, notes=tuple(notes))
