"""Layer series read from counter files, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from sluice.models.telemetry import LayerCounters
from sluice.server.errors import REASONS
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


def test_efforts_and_reasons_are_counted_from_zero() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(["light"], registry)
    assert registry.get_sample_value("sluice_effort_ratio_count") == 0
    metrics.asked(0.35)
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.3"}) == 0
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.4"}) == 1
    name = "sluice_policy_rejections_total"
    assert {registry.get_sample_value(name, {"reason": reason}) for reason in REASONS} == {0}
