"""What a seed decides: prompts, their order, when they come, and who leaves."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.loadtest.workload.arrivals import arrival_times
from sluice.loadtest.workload.fields import Bursts, Policy, Prompts
from sluice.loadtest.workload.prompts import prompts
from sluice.loadtest.workload.scenario import Scenario, ScenarioError
from sluice.loadtest.workload.schedule import Plan, draw_plan, phases, saturation_scenario, split
from sluice.models.offline.demo.tasks.tasks import is_heldout

MIXED: dict[str, Any] = {
    "description": "a test",
    "duration": 60,
    "arrivals": {"process": "poisson", "rate": 20},
    "policies": [{"weight": 3}, {"preset": "shallow"}],
    "disconnects": {"share": 0.25, "after_tokens": [2, 4]},
    "objectives": {"ttft_ms": 100},
}


def drawn(scenario: Scenario, number: int = 0, rate: float | None = 20.0) -> Plan:
    return draw_plan(scenario, phases(scenario)[number], rate, "m")


def seen(found: Plan) -> tuple[Any, ...]:
    return found.steady, found.leaving, [list(islice(requests, 5)) for requests in found.leavers]


def test_the_same_seed_sends_the_same() -> None:
    scenario = Scenario.parse(MIXED, "x")
    assert seen(drawn(scenario)) == seen(drawn(scenario))
    other = seen(drawn(scenario.changed(seed=1)))
    assert other != seen(drawn(scenario))
    assert other[0][0].prompts != drawn(scenario).steady[0].prompts
    assert other[0][0].due != drawn(scenario).steady[0].due


def test_the_same_seed_has_the_same_clients_leave() -> None:
    fields = {**MIXED, "arrivals": {"process": "concurrent", "streams": 20}}
    scenario = Scenario.parse(fields, "x")
    first, second = seen(drawn(scenario, rate=None)), seen(drawn(scenario, rate=None))
    assert first == second
    assert [load.streams for load in first[0]] == [11, 4]
    assert len(first[2]) == 4 + 1
    assert {ask.leave_after for requests in first[2] for ask in requests} == {2, 3, 4}


def test_each_line_of_a_file_is_asked_before_one_is_asked_again(tmp_path: Path) -> None:
    lines = [f"question {number}" for number in range(30)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"prompt": "{line}"}}\n' for line in lines))
    fields = Prompts(file=str(path))
    asked = list(islice(prompts(fields, "1"), 60))
    assert sorted(asked[:30]) == sorted(asked[30:]) == sorted(lines)
    assert asked == list(islice(prompts(fields, "1"), 60))
    assert asked[:30] != asked[30:] != lines
    assert asked != list(islice(prompts(fields, "2"), 60))


def test_requests_are_shared_out_by_weight_and_all_are_there() -> None:
    found = drawn(Scenario.parse(MIXED, "x"))
    counts = {load.policy: len(load.prompts) for load in found.steady}
    for ask in found.leaving:
        counts[ask.policy] += 1
    total = sum(counts.values())
    assert total == pytest.approx(20 * 60, abs=4 * np.sqrt(20 * 60))
    assert counts["full depth"] / total == pytest.approx(0.75, abs=0.06)
    assert len(found.leaving) / total == pytest.approx(0.25, abs=0.06)
    assert found.steady[1].body["routing"] == {"preset": "shallow"}
    assert "routing" not in found.steady[0].body
    assert found.leaving[0].body["model"] == "m"
    assert all(0 <= ask.due < 60 for ask in found.leaving if ask.due is not None)


def test_turns_have_the_same_arrivals_and_other_prompts() -> None:
    fields = {**MIXED, "turns": "policies", "rounds": 2, "disconnects": None}
    scenario = Scenario.parse(fields, "x")
    order = [(phase.round, phase.turn) for phase in phases(scenario)]
    assert order == [(0, "full depth"), (0, "shallow"), (1, "shallow"), (1, "full depth")]
    loads = [drawn(scenario, number).steady for number in range(4)]
    assert all(len(each) == 1 for each in loads)
    assert loads[0][0].due == loads[1][0].due
    assert loads[0][0].due != loads[2][0].due
    assert loads[0][0].prompts != loads[1][0].prompts
    assert [each[0].policy for each in loads] == [turn for _, turn in order]


def test_scraping_takes_turns() -> None:
    scenario = Scenario.load("scrape")
    found = {
        phase.turn: draw_plan(scenario, phase, None, "m").scraped for phase in phases(scenario)
    }
    assert found == {"unscraped": False, "scraped": True}


def test_the_saturating_rate_is_measured_with_clients_that_stay() -> None:
    probe = saturation_scenario(Scenario.load("ramp"))
    assert probe.arrivals.process == "concurrent"
    assert probe.arrivals.streams == 256
    assert probe.duration == 20
    assert probe.disconnects is None


def test_stages_multiply_the_rate() -> None:
    scenario = Scenario.load("ramp")
    sizes = [len(drawn(scenario, number).steady[0].prompts) for number in range(6)]
    for stage, size in zip(scenario.arrivals.stages, sizes, strict=True):
        assert size == pytest.approx(20 * 20 * stage, abs=5 * np.sqrt(400 * stage))


def test_constant_arrivals() -> None:
    rng = np.random.default_rng(0)
    assert arrival_times("constant", 4, 2, rng) == pytest.approx(np.arange(8) / 4)
    bursts = Bursts(factor=3.0, every=4.0, seconds=1.0)
    times = arrival_times("constant", 2, 8, rng, bursts)
    counts, _ = np.histogram(times, [0, 3, 4, 7, 8])
    assert counts.tolist() == [6, 6, 6, 6]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    times = arrival_times("poisson", 50, 200, np.random.default_rng(0))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(10_000, abs=400)
    assert times[0] >= 0
    assert times[-1] < 200
    assert (gaps >= 0).all()
    # Mean and standard deviation of exponential gaps are the same.
    assert gaps.mean() == pytest.approx(0.02, rel=0.05)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)


def test_split() -> None:
    policies = [Policy(name=name, weight=weight) for name, weight in (("a", 2.0), ("b", 1.0))]
    assert split(3, policies) == [2, 1]
    assert split(4, policies) == [3, 1]
    assert split(200, policies) == [133, 67]
    with pytest.raises(ScenarioError, match="policy b"):
        split(1, policies)


def test_prompts_are_of_the_mix() -> None:
    fields = Prompts(tasks={"sort": 3.0, "add": 1.0})
    found = list(islice(prompts(fields, "s"), 400))
    share = sum(text.startswith("sort ") for text in found) / 400
    assert share == pytest.approx(0.75, abs=0.07)
    assert {text.split()[0] for text in found} == {"sort", "add"}
    assert all(is_heldout(text) for text in found)


def test_long_prompts_end_with_the_question() -> None:
    fields = Prompts(tasks={"add": 1.0}, characters=300)
    for text in islice(prompts(fields, "s"), 20):
        *solved, question = text.split("\n")
        assert 300 <= len(text) < 340
        assert len(question.split()) == 3
        for line in solved:
            _, left, right, answer = line.split()
            assert int(left) + int(right) == int(answer)
