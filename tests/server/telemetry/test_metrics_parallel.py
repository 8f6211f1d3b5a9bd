"""Two API processes before one engine: whichever answers a scrape tells the truth about both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.gains import Gains, settled
from support.mixed_load import Told, asks, send
from support.processes import GAUGES, Processes
from support.serving import running_server

from sluice.models.routing.errors import REASONS

LAYERS = 8
SCRAPES = 16


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    log = tmp_path_factory.mktemp("two") / "log"
    arguments = ["--enforce-eager", "--dtype", "float32", "--api-server-count", "2"]
    with running_server(log, *arguments) as running:
        yield Processes(running.url, running.log)


@pytest.fixture(scope="module")
def load(two: Processes) -> tuple[Gains, Told]:
    gains = Gains(two)
    told = send(two, asks(rounds=2))
    settled(gains, told)
    return gains, told


def test_every_scrape_tells_the_whole_load(two: Processes, load: tuple[Gains, Told]) -> None:
    gains, told = load
    rows = 2 * LAYERS * told.plain_rows
    for report in told.reports:
        for layer in report["layers"]:
            rows += layer["attention"]["executed"] + layer["mlp"]["executed"]
    reasons = {(reason,): count for reason, count in told.reasons.items()}
    before = two.gauges()
    assert {name for name, _ in before} == GAUGES
    two.answered.clear()
    for _ in range(SCRAPES):
        gains.refresh()
        assert gains.by("sluice_requests_total", "preset", "outcome") == told.outcomes
        assert gains.by("sluice_policy_rejections_total", "reason") == reasons
        assert gains.of("sluice_request_compute_fraction_count") == len(told.reports) + told.plain
        assert gains.of("sluice_effort_ratio_count") == len(told.efforts)
        assert gains.by("sluice_layer_tokens_total", "outcome")["executed",] == rows
        generated = told.completion_tokens - told.samples
        assert gains.of_all("sluice_exit_tokens_total") == generated
        assert two.gauges() == before
        assert two.metrics_text().count("\nsluice_build_info{") == 1
    assert len(two.answered) == 2


def test_known_series_start_from_zero(load: tuple[Gains, Told]) -> None:
    gains, _ = load
    for outcome in ("ok", "rejected", "error", "aborted"):
        for preset in ("none", "custom", "shallow", "light"):
            assert gains.before("sluice_requests_total", preset=preset, outcome=outcome) == 0
    for reason in REASONS:
        assert gains.before("sluice_policy_rejections_total", reason=reason) == 0
