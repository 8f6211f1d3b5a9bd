"""Sums of single requests, of their samples, and the record made of them."""

from __future__ import annotations

import msgspec
import numpy as np

from sluice.kernels.ops.router_config import ACTIVE, ROUTED, TAKEN
from sluice.models.policy.axes import DECODE, PREFILL
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.request_sums import ExpertSums, RequestSums

LAYERS = 3
COST = ModuleCost(modules=np.array([[1.0, 3.0]] * LAYERS), fill=np.array([0.5] * LAYERS))


def some() -> RequestSums:
    sums = RequestSums.zeros(LAYERS)
    sums.counts += np.arange(sums.counts.size).reshape(sums.counts.shape)
    sums.exits += 2
    sums.heads[DECODE] += 3, 5
    sums.exit_layers += [0, 2]
    for index, layer in ((0, 2), (1, 0), (0, 1), (2, 1), (4, 0)):
        sums.add_token(index, layer)
    sums.skipped = np.array([[True, False], [False, True], [True, True]])
    sums.experts = ExpertSums(neighbour_dependent=True, loaded=9, layers=4)
    sums.experts.ran[DECODE, [ACTIVE, TAKEN, ROUTED]] = 6, 1, 4
    sums.experts.weak[PREFILL] = 5
    return sums


def crossed(sums: RequestSums) -> RequestSums:
    """Through msgpack, as from an engine to an API server."""
    return RequestSums.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(sums.to_wire())))


def test_sums_cross_to_the_server_whole() -> None:
    for sums in (some(), RequestSums.zeros(LAYERS)):
        came = crossed(sums)
        assert came.to_wire() == sums.to_wire()
        assert np.array_equal(came.counts, sums.counts)
        assert np.array_equal(came.heads, sums.heads)
        one, other = came.record(COST, None), sums.record(COST, None)
        assert one.exits.tolist() == other.exits.tolist()
        assert (one.mask, one.experts) == (other.mask, other.experts)
        assert one.compute_fraction == other.compute_fraction
        assert one.generated_compute_fraction == other.generated_compute_fraction


def test_the_record_of_sums() -> None:
    record = some().record(COST, None)
    assert record.token_layers == (2, 0, 1), "neither one computed again nor one out of order"
    assert record.exit_layers == (0, 2)
    assert record.mask == {"attention": [0, 2], "mlp": [1, 2]}
    assert record.experts is not None
    assert record.experts.active_mean == 1.5
    assert record.experts.loaded_per_step == 2.25
    assert (record.experts.masked, record.experts.weak_tokens) == (1, 5)


def test_samples_add_up() -> None:
    whole = crossed(some())
    whole.add(RequestSums.zeros(LAYERS))
    whole.add(crossed(some()))
    assert (whole.counts == 2 * some().counts).all()
    assert whole.heads[DECODE].tolist() == [6, 10]
    record = whole.record(COST, None)
    assert record.exits.tolist() == [4] * LAYERS
    assert record.exit_layers == (0, 2, 0, 2)
    assert record.token_layers == (), "of several samples nobody knows whose"
    assert record.mask == {"attention": [0, 2], "mlp": [1, 2]}
    assert record.experts is not None
    assert record.experts.neighbour_dependent
    assert (record.experts.active_mean, record.experts.loaded_per_step) == (1.5, 2.25)
    assert (record.experts.masked, record.experts.weak_tokens) == (2, 10)
