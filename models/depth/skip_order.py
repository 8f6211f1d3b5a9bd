"""Which layers go first: LLM-Drop's orders, and a documented stand-in without a profile.

Source: LLM-Drop, "What Matters in Transformers?" (arXiv 2406.15786). Units are attention modules,
MLPs, blocks, or attention and MLP together (joint layer drop); the least important, `S = 1 - cos`
of input and output, is left out first.

Without a profile nothing was measured, and the order is: from the last but one layer downwards,
then the last layer, then the first, since the first and last layers are what LIM finds most
important (arXiv 2406.17415) and redundancy grows with depth. Joint order takes a layer's
attention before its MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from sluice.models.policy.policy import Phase, SkipSet


class Unit(StrEnum):
    """What a fraction counts."""

    BLOCK = "block"
    ATTENTION = "attention"
    MLP = "mlp"
    JOINT = "joint"


Importance = Mapping[Unit, Sequence[float]]
"""Importance per layer for block, attention and mlp."""


def drop_order(
    unit: Unit, num_layers: int, importance: Importance | None
) -> list[tuple[Unit, int]]:
    """Units in the order in which they are left out, least important first.

    Args:
        unit: what to order; joint yields attention and MLP units.
        num_layers: layers of the model.
        importance: from a profile, or None for the order described in the module.
    """
    kinds = (Unit.ATTENTION, Unit.MLP) if unit is Unit.JOINT else (unit,)
    if importance is None:
        layers = [*range(num_layers - 2, 0, -1), num_layers - 1, 0][:num_layers]
        return [(kind, layer) for layer in layers for kind in kinds]
    units = [(kind, layer) for kind in kinds for layer in range(num_layers)]
    # Of equals the deeper goes first.
    return sorted(units, key=lambda item: (importance[item[0]][item[1]], -item[1]))


def skip_first(
    units: Sequence[tuple[Unit, int]], count: int, phase: Phase, *, elastic: bool = False
) -> SkipSet:
    """The skip set of the first `count` units of an order."""
    chosen = units[:count]
    return SkipSet.of(
        blocks=tuple(layer for kind, layer in chosen if kind is Unit.BLOCK),
        attention=tuple(layer for kind, layer in chosen if kind is Unit.ATTENTION),
        mlp=tuple(layer for kind, layer in chosen if kind is Unit.MLP),
        phase=phase,
        elastic=elastic,
    )
