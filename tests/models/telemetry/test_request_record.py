"""Sums and records of single requests."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sluice.kernels.ops.router_config import ACTIVE, ROUTED, TAKEN
from sluice.models.policy.axes import DECODE, EXECUTED, FILLED, PREFILL, SKIPPED
from sluice.models.telemetry import request_record
from sluice.models.telemetry.request_record import (
    ExpertSums,
    ModuleCost,
    RequestSumsByKey,
    RoutingRecord,
)

LAYERS = 3


def test_records_are_taken_once() -> None:
    records = RequestSumsByKey(LAYERS)
    records.get("a").exits += 1
    records.get("a").exits += 2
    taken = records.take("a")
    assert taken is not None
    assert taken.exits.tolist() == [3] * LAYERS
    assert taken.counts.shape == (2, LAYERS, 2, 3)
    assert records.take("a") is None


def test_records_of_vanished_clients_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_record, "_MAX_RECORDS", 3)
    records = RequestSumsByKey(LAYERS)
    for key in "abcde":
        records.get(key)
    assert [records.take(key) is not None for key in "abcde"] == [False, False, True, True, True]


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


def test_a_record_crosses_to_the_server_whole() -> None:
    """Through JSON, as through any of vLLM's ways from a worker."""
    sums = RequestSumsByKey(LAYERS).get("a")
    sums.counts += np.arange(sums.counts.size).reshape(sums.counts.shape)
    sums.exits += 2
    sums.exit_layers += [0, 2]
    for index, layer in ((0, 2), (1, 0), (0, 1), (2, 1), (4, 0)):
        sums.add_token("one", index, layer)
    sums.skipped = np.array([[True, False], [False, True], [True, True]])
    sums.experts = ExpertSums(neighbour_dependent=True, loaded=9, layers=4)
    sums.experts.ran[DECODE, [ACTIVE, TAKEN, ROUTED]] = 6, 1, 4
    sums.experts.weak[PREFILL] = 5
    cost = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))
    for record in (sums.record(cost, None), RequestSumsByKey(LAYERS).get("b").record(cost, None)):
        wire = record.to_wire()
        came = RoutingRecord.from_wire(json.loads(json.dumps(wire)))
        assert came.to_wire() == wire
        assert np.array_equal(came.counts, record.counts)
        assert np.array_equal(came.exits, record.exits)
        assert came.exit_layers == record.exit_layers
        assert came.token_layers == record.token_layers
        assert came.mask == record.mask
        assert came.experts == record.experts
        assert came.compute_fraction == record.compute_fraction
        assert came.generated_compute_fraction == record.generated_compute_fraction
    record = sums.record(cost, None)
    assert record.token_layers == (2, 0, 1), "neither one computed again nor one out of order"
    sums.add_token("another", 0, 2)
    assert sums.record(cost, None).token_layers == (), "of several samples nobody knows whose"
    assert record.mask == {"attention": [0, 2], "mlp": [1, 2]}
    assert record.experts is not None
    assert record.experts.active_mean == 1.5
    assert record.experts.loaded_per_step == 2.25
    assert (record.experts.masked, record.experts.weak_tokens) == (1, 5)
