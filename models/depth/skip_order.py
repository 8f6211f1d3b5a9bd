"""Which layers go first: LLM-Drop's orders.

Source: LLM-Drop, "What Matters in Transformers?" (arXiv 2406.15786). Units are attention modules,
MLPs, blocks, or attention and MLP together (joint layer drop); the least important, `S = 1 - cos`
of input and output, is left out first. Without a measurement there is no order: a layer that looks
like its neighbours may be one that the model cannot do without.
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


def drop_order(unit: Unit, num_layers: int, importance: Importance) -> list[tuple[Unit, int]]:
    """Units in the order in which they are left out, least important first.

    Args:
        unit: what to order; joint yields attention and MLP units.
        num_layers: layers of the model.
        importance: as measured.
    """
    kinds = (Unit.ATTENTION, Unit.MLP) if unit is Unit.JOINT else (unit,)
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
