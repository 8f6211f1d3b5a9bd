"""Expert series and the utilization matrix, read from counter files without a server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from sluice.kernels.ops.router_config import MASKED, ROWS
from sluice.models.telemetry.counter_file import WINDOW_SECONDS
from sluice.models.telemetry.expert_counters import ExpertCounters
from sluice.models.telemetry.layer_counters import LayerCounters
from sluice.server.telemetry.expert_metrics import ExpertCollector
from sluice.server.telemetry.utilization import utilization

LAYERS, EXPERTS = (1, 3), 4


def series(folder: Path, *, per_expert: bool = False) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(ExpertCollector(folder, per_expert=per_expert))
    return registry


def counters(folder: Path, name: str, step: list[list[int]]) -> ExpertCounters:
    """An engine whose only step selected, routed and masked that; the last two are extra."""
    made = ExpertCounters.create(folder / f"{name}.experts", LAYERS, EXPERTS)
    made.roll()
    made.total[:] += np.array(step)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two engines; layer 3 has routed nothing."""
    counters(tmp_path, "a", [[6, 2, 0, 0, 4, 5], [0, 0, 0, 0, 0, 0]])
    counters(tmp_path, "b", [[2, 2, 3, 1, 4, 1], [0, 0, 0, 0, 0, 0]])
    return tmp_path


def test_engines_are_summed_first(folder: Path) -> None:
    registry = series(folder)
    layer = {"layer": "1"}
    # 16 selections of 8 rows; the busiest of 4 experts has 8 of them.
    assert registry.get_sample_value("sluice_experts_active_mean", layer) == 2.0
    assert registry.get_sample_value("sluice_expert_load_max_mean_ratio", layer) == 2.0
    assert registry.get_sample_value("sluice_expert_masked_total", layer) == 6


def test_layers_without_rows_have_no_ratio_and_dense_ones_no_series(folder: Path) -> None:
    registry = series(folder)
    for name in ("sluice_experts_active_mean", "sluice_expert_load_max_mean_ratio"):
        value = registry.get_sample_value(name, {"layer": "3"})
        assert value is not None
        assert math.isnan(value)
        assert registry.get_sample_value(name, {"layer": "0"}) is None
    assert registry.get_sample_value("sluice_expert_masked_total", {"layer": "3"}) == 0


def test_ratios_are_of_the_window_and_totals_of_all_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("sluice.models.telemetry.counter_file.time.monotonic", lambda: now[0])
    made = ExpertCounters.create(tmp_path / "a.experts", LAYERS, EXPERTS)
    for selected in ([9, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        made.roll()
        made.total[0, :EXPERTS] += selected
        made.total[0, ROWS] += 2
        made.total[0, MASKED] += 1
        now[0] += WINDOW_SECONDS
    registry = series(tmp_path, per_expert=True)
    assert registry.get_sample_value("sluice_experts_active_mean", {"layer": "1"}) == 1.0
    assert registry.get_sample_value("sluice_expert_load_max_mean_ratio", {"layer": "1"}) == 1.0
    assert registry.get_sample_value("sluice_expert_masked_total", {"layer": "1"}) == 3
    total = {"layer": "1", "expert": "0"}
    assert registry.get_sample_value("sluice_expert_selections_total", total) == 10


def test_an_idle_engine_leaves_the_window_and_stays_in_the_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("sluice.models.telemetry.counter_file.time.monotonic", lambda: now[0])
    registry = series(tmp_path)
    layer = {"layer": "1"}
    counters(tmp_path, "idle", [[8, 0, 0, 0, 8, 3], [0] * 6])
    now[0] += 2 * WINDOW_SECONDS - 1
    counters(tmp_path, "busy", [[2, 2, 2, 2, 4, 1], [0] * 6])
    # 16 selections of 12 rows, and the busiest expert has 10 of them.
    assert registry.get_sample_value("sluice_experts_active_mean", layer) == 16 / 12
    assert registry.get_sample_value("sluice_expert_load_max_mean_ratio", layer) == 2.5
    now[0] += 1
    counters(tmp_path, "busy", [[2, 2, 2, 2, 4, 1], [0] * 6])
    assert registry.get_sample_value("sluice_experts_active_mean", layer) == 2.0
    assert registry.get_sample_value("sluice_expert_load_max_mean_ratio", layer) == 1.0
    assert registry.get_sample_value("sluice_expert_masked_total", layer) == 5


def test_a_restarted_engine_goes_on_counting(folder: Path) -> None:
    registry = series(folder, per_expert=True)
    masked, layer = "sluice_expert_masked_total", {"layer": "1"}
    expert = {"layer": "1", "expert": "0"}
    again = ExpertCounters.create(folder / "b.experts", LAYERS, EXPERTS)
    assert registry.get_sample_value(masked, layer) == 6
    assert registry.get_sample_value("sluice_expert_selections_total", expert) == 8
    # Its window starts afresh: what is left is the other engine's.
    assert again.window.sum() == 0
    again.roll()
    again.total[0, MASKED] += 1
    assert registry.get_sample_value(masked, layer) == 7
    assert again.window_rows.tolist() == [0, 0]


def test_an_engine_of_another_shape_starts_from_zero(folder: Path) -> None:
    other = ExpertCounters.create(folder / "b.experts", (0, 1), EXPERTS)
    assert other.layers == (0, 1)
    assert other.total.sum() == 0


def test_single_experts_are_shown_on_demand_only(folder: Path) -> None:
    def names(registry: CollectorRegistry) -> set[str]:
        return {family.name for family in registry.collect()}

    usual = {
        "sluice_experts_active_mean",
        "sluice_expert_load_max_mean_ratio",
        "sluice_expert_masked",
    }
    assert names(series(folder)) == usual
    registry = series(folder, per_expert=True)
    assert names(registry) == {*usual, "sluice_expert_selections"}
    labels = [{"layer": str(layer), "expert": str(e)} for layer in LAYERS for e in range(EXPERTS)]
    values = [registry.get_sample_value("sluice_expert_selections_total", one) for one in labels]
    assert values == [8, 4, 3, 1, 0, 0, 0, 0]


def test_a_dense_model_has_no_expert_values(tmp_path: Path) -> None:
    registry = series(tmp_path, per_expert=True)
    assert [sample for family in registry.collect() for sample in family.samples] == []
    LayerCounters.create(tmp_path / "a.counts", 2)
    assert utilization(tmp_path)["experts"] is None


def test_utilization_before_an_engine_has_started(tmp_path: Path) -> None:
    assert utilization(tmp_path) == {
        "object": "routing.utilization",
        "window_seconds": WINDOW_SECONDS,
        "layers": [],
        "exits": [],
        "experts": None,
    }


def test_utilization_sums_engines_and_tells_the_window(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("sluice.models.telemetry.counter_file.time.monotonic", lambda: now[0])
    counts = np.array([[[5, 1, 0], [3, 3, 0]], [[2, 2, 2], [6, 0, 0]]])
    engines = [LayerCounters.create(folder / f"{name}.counts", 2) for name in "ab"]
    for _ in range(3):
        for engine in engines:
            engine.add(counts, np.array([1, 4]))
        now[0] += WINDOW_SECONDS
    body = utilization(folder)
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
    assert body["exits"] == [{"layer": 0, "tokens": 6}, {"layer": 1, "tokens": 24}]
    selections = [[8, 4, 3, 1], [0, 0, 0, 0]]
    assert body["experts"] == {
        "layers": [1, 3],
        "experts": 4,
        "selections": selections,
        "window": selections,
        "window_rows": [8, 0],
        "masked": [6, 0],
    }
