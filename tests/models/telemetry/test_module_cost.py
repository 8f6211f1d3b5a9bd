"""The compute fraction: what ran, weighed by parameters."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sluice.models.policy.axes import EXECUTED, FILLED, SKIPPED
from sluice.models.telemetry.module_cost import ModuleCost

LAYERS = 3
NO_HEADS = np.zeros(2, dtype=np.int64)


def full_depth(rows: int) -> np.ndarray:
    counts = np.zeros((LAYERS, 2, 3), dtype=np.int64)
    counts[..., EXECUTED] = rows
    return counts


def test_compute_fraction_weighs_modules_by_their_parameters() -> None:
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    counts = full_depth(10)
    assert cost.fraction(counts, NO_HEADS) == 1.0
    counts[0, 1, EXECUTED], counts[0, 1, SKIPPED] = 0, 10
    assert cost.fraction(counts, NO_HEADS) == pytest.approx(9 / 12)
    counts[1, 0, EXECUTED], counts[1, 0, FILLED] = 0, 10
    assert cost.fraction(counts, NO_HEADS) == pytest.approx(8.5 / 12)
    assert cost.fraction(np.zeros_like(counts), NO_HEADS) == 1.0


def test_compute_fraction_counts_the_lm_head_and_those_of_exit_tests() -> None:
    """The head is a third of a sampled row: what saves the layers saves less than it seems."""
    cost = ModuleCost(np.array([[1.0, 3.0]] * LAYERS), np.array([0.5] * LAYERS), head=6.0)
    counts = full_depth(10)
    assert cost.fraction(counts, np.array([10, 10])) == 1.0
    counts[1:, :, EXECUTED], counts[1:, :, SKIPPED] = 0, 10
    assert cost.fraction(counts, np.array([10, 10])) == pytest.approx((4 + 6) / (12 + 6))
    # Two tests a row, and what the second one said is sampled from.
    assert cost.fraction(counts, np.array([10, 20])) == pytest.approx((4 + 12) / (12 + 6))


def test_rows_that_run_on_later_do_not_stretch_the_fraction() -> None:
    """A pending row left after layer 0 and ran layers 1 and 2 with a later token."""
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    counts = full_depth(2)
    counts[1:, :, SKIPPED] = 1
    assert cost.fraction(counts, NO_HEADS) == 1.0


def test_costs_cross_to_the_server_whole() -> None:
    cost = ModuleCost(np.array([[1.5, 3.0]] * LAYERS), np.array([0.5] * LAYERS), 2.0, 6.0)
    came = ModuleCost.from_wire(json.loads(json.dumps(cost.to_wire())))
    assert came.to_wire() == cost.to_wire()
    assert came.fraction(full_depth(1), np.array([1, 2])) == cost.fraction(
        full_depth(1), np.array([1, 2])
    )
