"""Expert series and the utilization matrix of what engines told, without a server."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from support.engines import EXPERTS, LAYERS, SHAPE, ToldEngines, counts

from sluice.models.telemetry import engine_counters
from sluice.models.telemetry.ledger import WINDOW_SECONDS
from sluice.server.telemetry.engines import Engines
from sluice.server.telemetry.expert_metrics import ExpertCollector
from sluice.server.telemetry.utilization import utilization


def series(engines: Engines, *, per_expert: bool = False) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(ExpertCollector(engines, per_expert=per_expert))
    return registry


@pytest.fixture
def told() -> ToldEngines:
    """Two engines; layer 2 has routed nothing."""
    made = ToldEngines.started([0, 1], SHAPE)
    made.tell(0, counts(selections={0: [6, 2, 0, 0, 4, 5]}))
    made.tell(1, counts(selections={0: [2, 2, 3, 1, 4, 1]}))
    return made


def test_each_engine_has_its_own(told: ToldEngines) -> None:
    registry = series(told.engines)
    found = [
        [
            registry.get_sample_value(name, {"engine": engine, "layer": "0"})
            for name in (
                "sluice_experts_active_mean",
                "sluice_expert_load_max_mean_ratio",
                "sluice_expert_masked_total",
            )
        ]
        for engine in "01"
    ]
    # 8 selections of 4 rows; the busiest of 4 experts has 6 of them, or 3.
    assert found == [[2.0, 3.0, 5], [2.0, 1.5, 1]]


def test_layers_without_rows_have_no_ratio_and_dense_ones_no_series(told: ToldEngines) -> None:
    registry = series(told.engines)
    for name in ("sluice_experts_active_mean", "sluice_expert_load_max_mean_ratio"):
        value = registry.get_sample_value(name, {"engine": "0", "layer": "2"})
        assert value is not None
        assert math.isnan(value)
        assert registry.get_sample_value(name, {"engine": "0", "layer": "1"}) is None
    masked = {"engine": "0", "layer": "2"}
    assert registry.get_sample_value("sluice_expert_masked_total", masked) == 0


def test_ratios_are_of_the_window_and_totals_of_all_time() -> None:
    told = ToldEngines.started([0], SHAPE)
    for selected in ([9, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        told.tell(0, counts(selections={0: [*selected, 2, 1]}))
    registry, layer = series(told.engines, per_expert=True), {"engine": "0", "layer": "0"}
    assert registry.get_sample_value("sluice_experts_active_mean", layer) == 1.0
    assert registry.get_sample_value("sluice_expert_load_max_mean_ratio", layer) == 1.0
    assert registry.get_sample_value("sluice_expert_masked_total", layer) == 3
    total = {**layer, "expert": "0"}
    assert registry.get_sample_value("sluice_expert_selections_total", total) == 10


def test_single_experts_are_shown_on_demand_only(told: ToldEngines) -> None:
    def names(registry: CollectorRegistry) -> set[str]:
        return {family.name for family in registry.collect()}

    usual = {
        "sluice_experts_active_mean",
        "sluice_expert_load_max_mean_ratio",
        "sluice_expert_masked",
    }
    assert names(series(told.engines)) == usual
    registry = series(told.engines, per_expert=True)
    assert names(registry) == {*usual, "sluice_expert_selections"}
    values = [
        registry.get_sample_value(
            "sluice_expert_selections_total",
            {"engine": "1", "layer": str(layer), "expert": str(expert)},
        )
        for layer in SHAPE.layers
        for expert in range(EXPERTS)
    ]
    assert values == [2, 2, 3, 1, 0, 0, 0, 0]


def test_a_dense_model_has_no_expert_values() -> None:
    told = ToldEngines.started([0])
    told.tell(0, counts(np.ones((LAYERS, 2, 3), dtype=np.int64)))
    registry = series(told.engines, per_expert=True)
    assert [sample for family in registry.collect() for sample in family.samples] == []
    assert utilization(told.engines)["experts"] is None


def test_utilization_before_the_engines_are_known() -> None:
    assert utilization(Engines()) == {
        "object": "routing.utilization",
        "window_seconds": WINDOW_SECONDS,
        "layers": [],
        "exits": [],
        "experts": None,
    }


def test_utilization_sums_engines_and_tells_the_window(told: ToldEngines) -> None:
    layer = [[5, 1, 0], [3, 3, 0]]
    ran = np.array([layer, [[2, 2, 2], [6, 0, 0]], layer])
    for new_window in (False, True, True):
        for engine in (0, 1):
            told.tell(engine, counts(ran, [1, 0, 4]), new_window=new_window)
    body = utilization(told.engines)
    json.dumps(body, allow_nan=False)
    assert body["layers"][1] == {
        "layer": 1,
        "attention": {"executed": 12, "skipped": 12, "filled": 12},
        "mlp": {"executed": 36, "skipped": 0},
        "window": {
            "attention": {"executed": 8, "skipped": 8, "filled": 8},
            "mlp": {"executed": 24, "skipped": 0},
        },
    }
    exits = [{"layer": layer, "tokens": tokens} for layer, tokens in enumerate((6, 0, 24))]
    assert body["exits"] == exits
    assert body["experts"] == {
        "layers": [0, 2],
        "experts": 4,
        "selections": [[8, 4, 3, 1], [0, 0, 0, 0]],
        "window": [[0, 0, 0, 0]] * 2,
        "window_rows": [0, 0],
        "masked": [6, 0],
    }


def test_an_idle_engine_leaves_the_window_and_stays_in_the_totals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(engine_counters.time, "monotonic", lambda: now[0])
    told = ToldEngines.started([0, 1], SHAPE)
    told.tell(0, counts(selections={0: [8, 0, 0, 0, 8, 3]}))
    now[0] += 2 * WINDOW_SECONDS + 1
    told.tell(1, counts(selections={0: [2, 2, 2, 2, 4, 1]}))
    experts = utilization(told.engines)["experts"]
    assert experts["window"] == [[2, 2, 2, 2], [0] * 4]
    assert experts["window_rows"] == [4, 0]
    assert experts["selections"] == [[10, 2, 2, 2], [0] * 4]
    assert experts["masked"] == [4, 0]
