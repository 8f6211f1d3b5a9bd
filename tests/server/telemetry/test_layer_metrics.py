"""Layer series of what engines told, without a server."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry
from support.engines import LAYERS, ToldEngines, counts

from sluice.models.routing.errors import REASONS
from sluice.server.telemetry.engines import Engines
from sluice.server.telemetry.metrics import LayerCollector, RequestMetrics


def series(engines: Engines) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(LayerCollector(engines))
    return registry


def executed(rows: int, skipped: int = 0) -> np.ndarray:
    return np.array([[[rows, skipped, 0]] * 2] * LAYERS)


def test_nothing_is_there_before_the_engines_are_known() -> None:
    assert [sample for family in series(Engines()).collect() for sample in family.samples] == []


def test_every_engine_and_layer_is_there_from_zero() -> None:
    told = ToldEngines.started([0, 1])
    registry = series(told.engines)
    told.tell(1, counts(executed(4), [2, 0, 5]))
    for layer, exits in enumerate((2, 0, 5)):
        labels = {"layer": str(layer)}
        for engine, expected in (("0", 0), ("1", exits)):
            found = registry.get_sample_value(
                "sluice_exit_tokens_total", {"engine": engine, **labels}
            )
            assert found == expected
    labels = {"engine": "1", "layer": "2", "module": "attention", "outcome": "filled"}
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 0
    labels = {**labels, "module": "mlp", "outcome": "executed"}
    assert registry.get_sample_value("sluice_layer_tokens_total", labels) == 4


def test_the_ratio_is_of_the_window_and_of_one_engine() -> None:
    told = ToldEngines.started([0, 1])
    registry = series(told.engines)

    def ratio(engine: int) -> float | None:
        labels = {"engine": str(engine), "layer": "1", "module": "mlp"}
        return registry.get_sample_value("sluice_layer_utilization_ratio", labels)

    told.tell(0, counts(executed(10)))
    assert ratio(0) == 1.0
    assert np.isnan(ratio(1)), "nothing has run"
    told.tell(1, counts(executed(5, skipped=5)))
    for _ in range(2):
        told.tell(0, counts(executed(1, skipped=3)))
    assert (ratio(0), ratio(1)) == (0.25, 0.5)


def test_a_restarted_engine_goes_on_counting() -> None:
    """A counter that falls would be counted again in full."""
    told = ToldEngines.started([0])
    registry = series(told.engines)
    name, labels = "sluice_layer_tokens_total", {"engine": "0", "layer": "0", "module": "mlp"}
    found = []
    for _ in range(3):  # Each one's first message.
        told.tell(0, counts(executed(5)))
        found.append(registry.get_sample_value(name, {**labels, "outcome": "executed"}))
    assert found == [5, 10, 15]


def test_efforts_and_reasons_are_counted_from_zero() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(["light"], registry)
    assert registry.get_sample_value("sluice_effort_ratio_count") == 0
    metrics.asked(0.35)
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.3"}) == 0
    assert registry.get_sample_value("sluice_effort_ratio_bucket", {"le": "0.4"}) == 1
    name = "sluice_policy_rejections_total"
    assert {registry.get_sample_value(name, {"reason": reason}) for reason in REASONS} == {0}
