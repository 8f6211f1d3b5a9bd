"""What the series and the utilization matrix gain in a mixed load is what its reports say ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.gains import Gains, settled
from support.mixed_load import Ask, Told, asks, send
from support.serving import Server

LAYERS, TOP_K = 8, 4


@pytest.fixture(scope="module")
def load(server: Server) -> tuple[Gains, Told]:
    return told_by(server, asks(rounds=3))


@pytest.fixture(scope="module")
def routed(server: Server, load: tuple[Gains, Told]) -> tuple[Gains, Told]:
    """After that: only requests whose rows run every layer."""
    return told_by(server, [ask for ask in asks(rounds=3) if at_full_depth(ask)])


def at_full_depth(ask: Ask) -> bool:
    return ask.preset != "shallow" and not {"depth", "effort", "preset"} & {*(ask.routing or {})}


def told_by(server: Server, load: Sequence[Ask]) -> tuple[Gains, Told]:
    gains = Gains(server)
    told = send(server, load)
    settled(gains, told)
    return gains, told


def test_layer_tokens(load: tuple[Gains, Told]) -> None:
    gains, told = load
    for layer in range(LAYERS):
        for module in ("attention", "mlp"):
            for outcome in ("executed", "skipped", "filled")[: 2 + (module == "attention")]:
                expected = sum(report["layers"][layer][module][outcome] for report in told.reports)
                expected += told.plain_rows * (outcome == "executed")
                labels = {"layer": str(layer), "module": module, "outcome": outcome}
                assert gains.of("sluice_layer_tokens_total", **labels) == expected, labels
                read = gains.of_matrix(lambda m, at=(layer, module, outcome): entry(m, *at))
                assert read == expected, labels
    assert gains.of("sluice_layer_tokens_total", layer="2", module="mlp", outcome="skipped") > 0


def entry(matrix: dict[str, Any], layer: int, module: str, outcome: str) -> int:
    count: int = matrix["layers"][layer][module][outcome]
    return count


def test_exit_tokens(load: tuple[Gains, Told]) -> None:
    gains, told = load
    for layer in range(LAYERS):
        expected = sum(report["exits"][layer]["tokens"] for report in told.reports)
        expected += told.plain_generated * (layer == LAYERS - 1)
        assert gains.of("sluice_exit_tokens_total", layer=str(layer)) == expected, layer
        assert gains.of_matrix(lambda m, at=layer: m["exits"][at]["tokens"]) == expected, layer
    # The last token of a sample goes through no step.
    generated = told.completion_tokens - told.samples
    assert gains.of_all("sluice_exit_tokens_total") == generated
    assert gains.of_all("vllm:generation_tokens_total") == told.completion_tokens


def selections(report: dict[str, Any]) -> float:
    """Experts that the rows of a request ran, over layers."""
    rows = sum(layer["mlp"]["executed"] for layer in report["layers"])
    mean = report["experts"]["active_mean"] if "experts" in report else TOP_K
    return float(rows * mean)


def selected(matrix: dict[str, Any]) -> int:
    return sum(map(sum, matrix["experts"]["selections"]))


def test_selections_and_masked_ones(routed: tuple[Gains, Told]) -> None:
    gains, told = routed
    # The means of the reports are rounded to six digits.
    expected = sum(map(selections, told.reports)) + told.plain_rows * LAYERS * TOP_K
    assert gains.of_matrix(selected) == round(expected)
    masked = sum(report["experts"]["masked"] for report in told.reports if "experts" in report)
    assert masked > 0
    assert gains.of_all("sluice_expert_masked_total") == masked
    assert gains.of_matrix(lambda m: sum(m["experts"]["masked"])) == masked


def test_rows_that_run_masked_are_all_that_is_selected_beside(load: tuple[Gains, Told]) -> None:
    """Where masking rows is cheaper than taking them out, experts serve rows that count skipped."""
    gains, told = load
    expected = sum(map(selections, told.reports)) + told.plain_rows * LAYERS * TOP_K
    skipped = gains.by("sluice_layer_tokens_total", "module", "outcome")["mlp", "skipped"]
    assert round(expected) <= gains.of_matrix(selected) <= expected + TOP_K * skipped


def test_requests_and_refusals(load: tuple[Gains, Told]) -> None:
    gains, told = load
    assert gains.by("sluice_requests_total", "preset", "outcome") == told.outcomes
    reasons = {(reason,): count for reason, count in told.reasons.items()}
    assert gains.by("sluice_policy_rejections_total", "reason") == reasons
    ok = sum(n for (_, outcome), n in told.outcomes.items() if outcome == "ok")
    assert ok == len(told.reports) + told.plain
    assert gains.of("sluice_request_compute_fraction_count") == ok


def test_compute_fractions_and_efforts(load: tuple[Gains, Told]) -> None:
    gains, told = load
    ran = sum(report["compute_fraction"] for report in told.reports) + told.plain
    found = gains.of("sluice_request_compute_fraction_sum")
    assert found == pytest.approx(ran, abs=1e-6 * len(told.reports))
    assert gains.of("sluice_effort_ratio_count") == len(told.efforts) > 0
    assert gains.of("sluice_effort_ratio_sum") == pytest.approx(sum(told.efforts))
