"""Reports: whole, in agreement with each other, and a page that needs nothing else."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.html_page import Page
from support.load_results import ended, requests, results

from sluice.loadtest.report.files import write_report
from sluice.loadtest.report.results import Results
from sluice.loadtest.workload.scenario import Scenario
from sluice.loadtest.workload.schedule import Phase

NASTY = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def run() -> Results:
    """Two turns with two policies' worth of requests, some of which ended otherwise."""
    given = {
        "description": f"a test {NASTY}",
        "duration": 5,
        "rounds": 1,
        "turns": "policies",
        "arrivals": {"process": "poisson", "rate": 10, "stages": [1, 2]},
        "policies": [{"name": NASTY}, {"preset": "b"}],
        "objectives": {"ttft_ms": 300},
    }
    phases = [
        (Phase(0, turn, stage), (*requests(30, seed, turn), ended(1001.0, "hung", policy=turn)))
        for seed, turn in enumerate((NASTY, "b"))
        for stage in (1.0, 2.0)
    ]
    return results(Scenario.parse(given, "x"), *phases)


@pytest.fixture(scope="module")
def folder(run: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "inner"
    write_report(run, out)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["report.csv", "report.html", "report.json", "requests.csv"]


def test_json_and_csv_say_the_same(run: Results, folder: Path) -> None:
    wire: dict[str, Any] = json.loads((folder / "report.json").read_text())
    table = rows_of(folder / "report.csv")
    assert len(wire["rows"]) == len(table) == len(run.rows()) == 4
    for row, line, held in zip(wire["rows"], table, run.rows(), strict=True):
        assert row["policy"] == line["policy"] == held.policy
        assert row["goodput"] == float(line["goodput"]) == held.summary.goodput
        assert row["throughput"] == float(line["throughput"]) == held.summary.throughput
        for name, times in held.summary.times.items():
            assert row["times"][name] == times
            for rank, value in times.items():
                assert float(line[f"{name}_{rank}"]) == value
    assert Scenario.parse(wire["scenario"] | {"arrivals": {"process": "poisson", "rate": 1}}, "x")
    assert {entry["name"] for entry in wire["metrics"]} == {
        "a_total",
        "seconds_count",
        "seconds_sum",
    }
    assert wire["left"]["vllm:num_requests_running"] == 0
    assert wire["memory"]["resident_mb"] == [100, 101, 102]
    assert [verdict["met"] for verdict in wire["verdicts"]][:2] == [False, True]
    assert wire["verdict"]["met"] is False
    ratio = wire["ratios"]["goodput"][0]
    assert (ratio["turn"], ratio["base"], len(ratio["values"])) == ("b", NASTY, 1)


def test_every_request_is_there(run: Results, folder: Path) -> None:
    table = rows_of(folder / "requests.csv")
    assert len(table) == len(run.requests) == 4 * 31
    for line, sent in zip(table, run.requests, strict=True):
        wanted = {name: "" if value is None else str(value) for name, value in asdict(sent).items()}
        assert {name: line[name] for name in wanted} == wanted


def test_the_page_needs_nothing_else(run: Results, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert NASTY in page.text
    for _, held in page.elements:
        assert not held.keys() & {"src", "srcset"}
        assert held.get("href", "#").startswith("#")
    assert "@import" not in text
    assert "url(" not in text
    assert page.of("meta", name="viewport")
    policy = page.of("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert policy.startswith("default-src 'none'")
    ids = [held["id"] for _, held in page.elements if "id" in held]
    assert len(ids) == len({*ids})
    charts = page.of("svg")
    assert len(charts) == 5
    assert all({*held["aria-labelledby"].split()} <= {*ids} for held in charts)
    assert not page.of("image")
    assert f"{NASTY}: half of 60 answers within" in page.text


def test_the_page_shows_the_numbers(run: Results, folder: Path) -> None:
    tables = Page((folder / "report.html").read_text()).tables
    shown = tables["By phase and policy"][1:]
    assert len(shown) == len(run.rows())
    for line, row in zip(shown, run.rows(), strict=True):
        assert line[0] == [row.phase.turn]
        assert line[4] == [row.summary.requests]
        assert line[8] == [row.summary.throughput]
        assert line[10] == [row.summary.goodput]
    times = tables["End to end, ms"][1:]
    assert times[0][4] == [run.rows()[0].summary.times["e2el_ms"]["p50"]]
    bars = {line[0][0]: line[2] for line in tables["Bars"][1:]}
    assert bars["no request hangs"] == ["no"]
    assert bars["no request is lost"] == ["yes"]
    ratios = tables["Goodput over the first turn's of the same round"]
    assert len(ratios) == 3
    added = tables["Series that only grow and did, without buckets"][1:]
    assert [line[3] for line in added] == [[2], [7], [2], [4.5]]


def test_the_page_starts_with_one_verdict_and_what_it_was_measured_with(
    run: Results, tmp_path: Path
) -> None:
    told = replace(run, date="2026-01-02T03:04:05+00:00", hardware="a computer, 2 cores")
    write_report(told, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    head = page.text[: page.text.index("Verdicts\n")]
    missed = "Failed: 1 of 6 bars missed: no request hangs"
    for text in (missed, "2026-01-02 03:04 UTC", "a computer, 2 cores", "sluice 1"):
        assert text in head
    wire = json.loads((tmp_path / "report.json").read_text())
    assert (wire["date"], wire["hardware"]) == (told.date, told.hardware)
    phases = tuple(
        replace(each, requests=tuple(r for r in each.requests if r.ending != "hung"))
        for each in run.phases
    )
    write_report(replace(run, phases=phases), tmp_path)
    passed = Page((tmp_path / "report.html").read_text())
    assert "Passed: all 6 bars were met" in passed.text
    assert len(passed.of("p", **{"class": "overall met"})) == 1


def test_the_same_run_makes_the_same_page(run: Results, folder: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path)
    for name in ("report.html", "report.json", "report.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_without_memory_or_answers(tmp_path: Path) -> None:
    given = {
        "description": "nobody came",
        "duration": 1,
        "memory": False,
        "arrivals": {"process": "concurrent", "streams": 3},
        "objectives": {"ttft_ms": 300},
    }
    sent = (ended(1.0, "refused", status=400, detail="no"),)
    phase = (Phase(0, "all", 1.0), sent)
    write_report(results(Scenario.parse(given, "x"), phase, memory=None, rate=None), tmp_path)
    assert "3 clients, each asking again at once" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["memory"] is None
    (line,) = rows_of(tmp_path / "report.csv")
    assert line["ttft_ms_p50"] == ""
    assert line["endings"] == "1 400 without Retry-After"
