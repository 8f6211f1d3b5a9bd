"""Scenario files: the shipped ones are right, and a wrong field is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.loadtest.workload.fields import FULL_DEPTH
from sluice.loadtest.workload.scenario import Scenario, ScenarioError, shipped
from sluice.models.offline.demo.tasks.tasks import TASKS

GOOD: dict[str, Any] = {
    "description": "a test",
    "duration": 5,
    "arrivals": {"process": "poisson", "rate": 2},
    "objectives": {"ttft_ms": 100},
}
CLIENTS = {"process": "concurrent", "streams": 4}


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def test_defaults() -> None:
    scenario = Scenario.parse(GOOD, "x")
    assert [policy.name for policy in scenario.policies] == [FULL_DEPTH]
    assert scenario.policies[0].body == {}
    assert tuple(scenario.prompts.tasks) == TASKS
    assert scenario.arrivals.stages == (1.0,)


@pytest.mark.parametrize("name", shipped())
def test_shipped_scenarios_are_right(name: str) -> None:
    assert Scenario.load(name).description


def test_the_issues_scenarios_are_shipped() -> None:
    wanted = {"steady", "burst", "ramp", "mixed", "long-prompts", "disconnects", "soak"}
    assert wanted | {"fast", "scrape"} == set(shipped())
    disconnects, soak = Scenario.load("disconnects"), Scenario.load("soak")
    assert disconnects.arrivals.streams == 200
    assert disconnects.disconnects is not None
    assert disconnects.disconnects.share == 0.1
    assert soak.duration == 30 * 60
    assert soak.bars.memory_mb_per_1000 == 1
    ramp = Scenario.load("ramp")
    assert (ramp.arrivals.stages[-1], ramp.bars.throughput_kept) == (2, 0.9)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"durations": 5}, "durations"),
        ({"duration": 0}, "duration"),
        ({"duration": "5"}, "duration"),
        ({"duration": float("inf")}, "duration"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"rounds": 0}, "rounds"),
        ({"arrivals": {"process": "uniform", "rate": 1}}, "arrivals.process"),
        ({"arrivals": {"process": "poisson"}}, "rate or saturation"),
        (
            {
                "arrivals": {
                    "process": "poisson",
                    "rate": 1,
                    "saturation": {"streams": 4, "seconds": 5},
                }
            },
            "rate or saturation",
        ),
        ({"arrivals": {"process": "poisson", "rate": 1, "streams": 2}}, "streams"),
        ({"arrivals": {**CLIENTS, "rate": 3}}, "rate"),
        ({"arrivals": {**CLIENTS, "stages": [1, 2]}}, "stages"),
        ({"arrivals": {"process": "concurrent"}}, "streams"),
        ({"arrivals": {"process": "constant", "rate": 0}}, "arrivals.rate"),
        ({"arrivals": {"process": "constant", "rate": 1, "stages": []}}, "arrivals.stages"),
        ({"arrivals": {"process": "constant", "rate": 1, "stages": [1, -2]}}, "arrivals.stages.1"),
        (
            {
                "arrivals": {
                    "process": "constant",
                    "rate": 1,
                    "bursts": {"factor": 2, "every": 1, "seconds": 1},
                }
            },
            "arrivals.bursts",
        ),
        ({"prompts": {"tasks": {"cooking": 1}}}, "prompts.tasks"),
        ({"prompts": {"tasks": {}}}, "prompts.tasks"),
        ({"prompts": {"tasks": {"sort": 0}}}, "prompts.tasks.sort"),
        ({"prompts": {"characters": 2000}}, "prompts.characters"),
        ({"prompts": {"max_token": 3}}, "prompts.max_token"),
        ({"policies": []}, "policies"),
        ({"policies": [{"preset": "a", "routing": {}}]}, "policies.0"),
        ({"policies": [{"preset": "a"}, {"preset": "a"}]}, "policies"),
        ({"policies": [{"preset": "a", "weight": 0}]}, "policies.0.weight"),
        ({"policies": [{"routing": [1]}]}, "policies.0.routing"),
        ({"objectives": {}}, "objectives"),
        ({"objectives": {"ttft": 3}}, "objectives.ttft"),
        ({"disconnects": {"share": 0, "after_tokens": [1, 2]}}, "disconnects.share"),
        ({"disconnects": {"share": 0.5, "after_tokens": [3, 2]}}, "disconnects.after_tokens"),
        ({"disconnects": {"share": 0.5, "after_tokens": [1, 2, 3]}}, "disconnects.after_tokens"),
        ({"disconnects": {"share": 0.5, "after_tokens": [1, 99]}}, "disconnects.after_tokens"),
        ({"turns": "policies"}, "turns"),
        ({"turns": "scraping"}, "turns"),
        ({"scrape_every": 1, "metrics": False}, "scrape_every"),
        ({"bars": {"throughput_kept": 0.9}}, "bars.throughput_kept"),
        ({"bars": {"scraped_throughput": 0.9}}, "bars.scraped_throughput"),
        ({"bars": {"scrape_p99_ms": 9}}, "bars.scrape_p99_ms"),
        ({"bars": {"goodput_ratio": 1}}, "bars.goodput_ratio"),
        ({"bars": {"memory_mb_per_1000": 1}, "memory": False}, "bars.memory_mb_per_1000"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        Scenario.parse(changed(**fields), "file")
    assert str(caught.value).startswith("file: ")
    assert named in str(caught.value)


@pytest.mark.parametrize("missing", ["description", "duration", "arrivals", "objectives"])
def test_a_missing_field_is_named(missing: str) -> None:
    rest = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(ScenarioError, match=missing):
        Scenario.parse(rest, "file")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert Scenario.load(str(path)) == Scenario.parse(GOOD, "x")
    path.write_text("a: [")
    with pytest.raises(ScenarioError, match="no YAML"):
        Scenario.load(str(path))
    # Not a date: lm-format-enforcer, if vLLM has loaded it, makes dates text for all of PyYAML.
    path.write_text("description: !!set {a}")
    with pytest.raises(ScenarioError, match="set is not JSON"):
        Scenario.load(str(path))
    with pytest.raises(ScenarioError, match="shipped scenarios: burst"):
        Scenario.load("no-such-scenario")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two", "answer": "2"}\n')
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(prompts={"file": "mine.jsonl"})))
    scenario = Scenario.load(str(path))
    assert scenario.prompts.texts == ("one", "two")
    assert scenario.changed(seed=3).prompts == scenario.prompts


@pytest.mark.parametrize(
    ("line", "more", "named"),
    [
        ('{"prompt": "one"}', {"tasks": {"sort": 1}}, "prompts: tasks does not go with file"),
        ('{"prompt": "one"}', {"characters": 9}, "prompts: characters does not go with file"),
        ('{"text": "one"}', {}, "mine.jsonl:1: prompt is missing"),
        ('{"prompt": "one"', {}, "mine.jsonl:1: not JSON"),
        ('{"prompt": ""}', {}, "mine.jsonl:1: prompt is empty"),
        ("", {}, "mine.jsonl: no examples"),
        (None, {}, "mine.jsonl: No such file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used(
    tmp_path: Path, line: str | None, more: dict[str, Any], named: str
) -> None:
    if line is not None:
        (tmp_path / "mine.jsonl").write_text(line)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(prompts={"file": "mine.jsonl", **more})))
    with pytest.raises(ScenarioError) as caught:
        Scenario.load(str(path))
    assert named in str(caught.value)


def test_changes_are_checked_too() -> None:
    scenario = Scenario.load("soak")
    assert scenario.changed(duration=60.0).duration == 60
    assert scenario.changed(duration=60.0).policies == scenario.policies
    with pytest.raises(ScenarioError, match="duration"):
        scenario.changed(duration=-1.0)
