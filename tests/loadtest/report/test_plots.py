"""Charts of a run show its numbers."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes
from support.load_results import requests, results

from sluice.loadtest.report.plots import charts
from sluice.loadtest.report.results import Results
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import Phase

TURNS = ("a", "b")
STAGES = (1.0, 2.0)


@pytest.fixture(scope="module")
def run() -> Results:
    given = {
        "description": "two policies in turns, in two stages",
        "duration": 5,
        "turns": "policies",
        "arrivals": {"process": "poisson", "rate": 10, "stages": [*STAGES]},
        "policies": [{"name": name} for name in TURNS],
        "objectives": {"ttft_ms": 300},
    }
    phases = [
        (Phase(0, turn, stage), requests(20, int(10 * stage) + number, turn))
        for number, turn in enumerate(TURNS)
        for stage in STAGES
    ]
    return results(Scenario.parse(given, "x"), *phases)


@pytest.fixture(scope="module")
def drawn(run: Results) -> dict[str, Axes]:
    return {chart.title: chart.figure.axes[0] for chart in charts(run)}


def test_latencies_are_those_of_the_answers(run: Results, drawn: dict[str, Axes]) -> None:
    lines = {line.get_label(): line for line in drawn["Time to the end of an answer"].lines}
    assert [*lines] == [*TURNS]
    for turn, line in lines.items():
        mine = sorted(1000 * each.latency for each in run.requests if each.policy == turn)
        assert line.get_xdata().tolist() == pytest.approx(mine)
        assert line.get_ydata()[-1] == 100


def test_every_request_is_sent_and_ends_at_some_time(run: Results, drawn: dict[str, Axes]) -> None:
    for stairs in drawn["Requests over time"].patches:
        values, edges, _ = stairs.get_data()
        assert (values * (edges[1:] - edges[:-1])).sum() == pytest.approx(len(run.requests))


def test_stages_and_turns_have_the_rows_numbers(run: Results, drawn: dict[str, Axes]) -> None:
    rows = {(row.phase.turn, row.phase.stage): row.summary for row in run.totals()}
    points = {line.get_label(): line for line in drawn["Stages"].lines}
    for turn in TURNS:
        for name, number in (("answers", "answer_rate"), ("goodput", "goodput")):
            line = points[f"{name}, {turn}"]
            assert [*line.get_xdata()] == [10.0, 20.0]
            assert [*line.get_ydata()] == [getattr(rows[turn, stage], number) for stage in STAGES]
    (turns,) = (axes for title, axes in drawn.items() if title.startswith("Turns, good requests"))
    for line in turns.lines:
        turn = line.get_label()
        assert [*line.get_ydata()] == [rows[turn, stage].goodput for stage in STAGES]


def test_memory_is_what_was_sampled(drawn: dict[str, Axes]) -> None:
    (line,) = drawn["Memory of the server's processes"].lines
    assert line.get_xdata().tolist() == [0, 10, 20]
    assert [*line.get_ydata()] == [100.0, 101.0, 102.0]
