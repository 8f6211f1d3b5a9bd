"""Layer series read from counter files, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from sluice.models.routing.errors import REASONS
from sluice.models.telemetry.counter_file import WINDOW_SECONDS
from sluice.models.telemetry.layer_counters import LayerCounters
from sluice.server.telemetry.metrics import LayerCollector, RequestMetrics


def test_engines_are_summed_and_every_layer_is_there(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(LayerCollector(tmp_path))
    assert registry.get_sample_value("sluice_exit_tokens_total", {"layer": "0"}) is None
    engines = [LayerCounters.create(tmp_path / f"{name}.counts", 3) for name in "ab"]
    for counters in engines:
        counters.add(np.ones((3, 2, 3), dtype=np.int64), np.array([2, 0, 5]))
    exits = [
        registry.get_sample_value("sluice_exit_tokens_total", {"layer": str(layer)})
        for layer in range(3)
    ]
    assert exits == [4, 0, 10]
    labels = {"layer": "2", "module": "attention", "outcome": "filled"}
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 2


def executed(rows: int, skipped: int = 0) -> np.ndarray:
    return np.array([[[rows, skipped, 0]] * 2] * 3)


NOTHING = np.zeros(3, dtype=np.int64)


def test_a_restarted_engine_goes_on_counting(tmp_path: Path) -> None:
    """The sum over engines must not fall: Prometheus would count the other engine's work again."""
    registry = CollectorRegistry()
    registry.register(LayerCollector(tmp_path))
    labels = {"layer": "0", "module": "mlp", "outcome": "executed"}
    for name in "ab":
        engine = LayerCounters.create(tmp_path / f"{name}.counts", 3)
        engine.add(executed(5), np.array([0, 0, 2]))
    again = LayerCounters.create(tmp_path / "b.counts", 3)
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 10
    assert registry.get_sample_value("sluice_exit_tokens_total", {"layer": "2"}) == 4
    assert again.window.sum() == 0
    again.add(executed(1), np.array([0, 0, 1]))
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 11
    assert registry.get_sample_value("sluice_exit_tokens_total", {"layer": "2"}) == 5
    assert again.window[0].tolist() == [[1, 0, 0]] * 2
    assert not list(tmp_path.glob("*.partial"))


def test_an_engine_of_another_depth_starts_from_zero(tmp_path: Path) -> None:
    LayerCounters.create(tmp_path / "a.counts", 3).add(executed(5), NOTHING)
    other = LayerCounters.create(tmp_path / "a.counts", 4)
    assert other.totals.shape == (4, 2, 3)
    assert other.totals.sum() == 0


def test_an_idle_engine_leaves_the_ratio_and_stays_in_the_totals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("sluice.models.telemetry.counter_file.time.monotonic", lambda: now[0])
    registry = CollectorRegistry()
    registry.register(LayerCollector(tmp_path))
    ratio, labels = "sluice_layer_utilization_ratio", {"layer": "1", "module": "mlp"}
    idle, busy = (LayerCounters.create(tmp_path / f"{name}.counts", 3) for name in ("a", "b"))
    idle.add(executed(10), NOTHING)
    assert registry.get_sample_value(ratio, labels) == 1.0
    now[0] += 2 * WINDOW_SECONDS - 1
    busy.add(executed(5, skipped=5), NOTHING)
    assert registry.get_sample_value(ratio, labels) == 0.75
    now[0] += 2 * WINDOW_SECONDS
    busy.add(executed(5, skipped=5), NOTHING)
    assert registry.get_sample_value(ratio, labels) == 0.5
    labels["outcome"] = "executed"
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 20


def test_efforts_and_reasons_are_counted_from_zero() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(["light"], registry)
    assert registry.get_sample_value("sluice_effort_ratio_count") == 0
    metrics.asked(0.35)
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.3"}) == 0
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.4"}) == 1
    name = "sluice_policy_rejections_total"
    assert {registry.get_sample_value(name, {"reason": reason}) for reason in REASONS} == {0}
