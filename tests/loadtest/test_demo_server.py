"""Whole runs against the demo model's server: everything sent ends, is counted, and is reported."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from support.serving import Server, running_server

from sluice.loadtest.__main__ import main

QUEUE = 16
PRESETS = """
presets:
  shallow:
    depth: {skip: {blocks: [4, 5]}}
"""
SHORT: dict[str, Any] = {
    "description": "a test",
    "duration": 3,
    "warm_up": 0,
    "prompts": {"max_tokens": 8, "ignore_eos": True},
    "arrivals": {"process": "poisson", "rate": 4},
    "objectives": {"e2el_ms": 60000},
}

NO_MLP = {"depth": {"skip": {"mlp": [3]}}}


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes so many requests at once and no more."""
    folder = tmp_path_factory.mktemp("bounded")
    (folder / "presets.yaml").write_text(PRESETS)
    settings = ["--enforce-eager", "--dtype", "float32", "--presets", str(folder / "presets.yaml")]
    limits = ["--max-open-requests", str(QUEUE), "--retry-after", "2"]
    # One request of ours may be many of vLLM's.
    limits += ["--max-num-queued-reqs", str(4 * QUEUE)]
    with running_server(folder / "log", *settings, *limits) as running:
        yield running


def played(server: Server, folder: Path, status: int = 0, **fields: Any) -> dict[str, Any]:
    """Play a scenario as a user does: the report."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SHORT, **fields}))
    assert main([str(path), "--url", server.url, "--out", str(folder)]) == status
    report: dict[str, Any] = json.loads((folder / "mine" / "report.json").read_text())
    return report


def asked(folder: Path) -> list[dict[str, str]]:
    with (folder / "mine" / "requests.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def added(report: dict[str, Any], name: str, **labels: str) -> float:
    return sum(
        entry["delta"]
        for entry in report["metrics"]
        if entry["name"] == name and labels.items() <= entry["labels"].items()
    )


def test_mixed_policies_are_all_sent_and_all_counted(bounded: Server, tmp_path: Path) -> None:
    policies = [{"preset": "shallow", "weight": 2}, {"name": "no MLP", "routing": NO_MLP}]
    arrivals = {"process": "constant", "rate": 3}
    report = played(bounded, tmp_path, policies=policies, arrivals=arrivals, duration=4)
    requests = asked(tmp_path)
    assert {each["ending"] for each in requests} == {"answered"}
    assert report["rows"][0]["policy"] == "all"
    sent = Counter(each["policy"] for each in requests)
    assert sum(sent.values()) == report["rows"][0]["requests"] == 12
    assert set(sent) == {"shallow", "no MLP"}
    # One of each policy is tried before anything is measured.
    for preset, policy in (("shallow", "shallow"), ("custom", "no MLP")):
        counted = added(report, "sluice_requests_total", preset=preset, outcome="ok")
        assert counted == sent[policy] + 1, preset
    tokens = sum(int(each["tokens"]) for each in requests)
    assert tokens == 8 * 12
    assert added(report, "vllm:generation_tokens_total") == tokens + 8 * 2
    assert report["left"]["vllm:num_requests_running"] == 0
    assert all(verdict["met"] for verdict in report["verdicts"])
    assert all(row["times"]["e2el_ms"]["p50"] > 0 for row in report["rows"])


def test_the_same_seed_sends_the_same_at_the_same_times(bounded: Server, tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        played(bounded, tmp_path / name, seed=5)
        runs.append(asked(tmp_path / name))
    assert len(runs[0]) > 3
    assert [each["prompt"] for each in runs[0]] == [each["prompt"] for each in runs[1]]
    starts = [[float(each["due"]) for each in run] for run in runs]
    gaps = [[due - each[0] for due in each] for each in starts]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-3)


def test_beyond_the_queue_each_request_is_refused_with_a_time(
    bounded: Server, tmp_path: Path
) -> None:
    report = played(
        bounded,
        tmp_path,
        arrivals={"process": "constant", "rate": 80},
        prompts={"max_tokens": 100, "ignore_eos": True},
        duration=2,
    )
    (row,) = report["rows"]
    assert set(row["endings"]) == {"answered", "503 with Retry-After"}
    assert sum(row["endings"].values()) == row["requests"] == 160
    refused = row["endings"]["503 with Retry-After"]
    assert 0 < refused <= 160 - QUEUE
    assert added(report, "http_requests_total", status="5xx") == refused
    assert report["left"] == {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "seconds": report["left"]["seconds"],
    }


def test_vllms_own_refusal_has_a_time_too(bounded: Server) -> None:
    body = {"model": "demo", "prompt": "x", "n": 4 * QUEUE + 1, "max_tokens": 2}
    answer = httpx.post(f"{bounded.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert "try again" in answer.json()["error"]["message"]


def test_clients_that_leave_leave_nothing_behind(bounded: Server, tmp_path: Path) -> None:
    report = played(
        bounded,
        tmp_path,
        arrivals={"process": "concurrent", "streams": 5},
        disconnects={"share": 0.4, "after_tokens": [1, 5]},
        prompts={"max_tokens": 20, "ignore_eos": True},
    )
    (row,) = report["rows"]
    assert set(row["endings"]) == {"answered", "aborted"}
    left = [each for each in asked(tmp_path) if each["ending"] == "aborted"]
    assert {each["tokens"] for each in left} > {"1", "3", "5"}
    assert report["left"]["vllm:num_requests_running"] == 0
    assert report["left"]["vllm:num_requests_waiting"] == 0
    assert added(report, "sluice_requests_total", outcome="aborted") > 0
    # One request is tried first; one whose client left before the server read it is not counted.
    reached = 1 + row["endings"]["answered"] + sum(each["tokens"] != "0" for each in left)
    assert reached <= added(report, "sluice_requests_total") <= row["requests"] + 1


def test_scraping_takes_turns_and_memory_is_watched(bounded: Server, tmp_path: Path) -> None:
    report = played(
        bounded,
        tmp_path,
        arrivals={"process": "concurrent", "streams": 2},
        turns="scraping",
        scrape_every=0.25,
        duration=2,
    )
    assert {row["turn"] for row in report["rows"]} == {"scraped", "unscraped"}
    assert report["scrapes"]["count"] >= 8
    assert 0 < report["scrapes"]["p50_ms"] <= report["scrapes"]["p99_ms"]
    (ratio,) = report["ratios"]["throughput"]
    assert (ratio["turn"], ratio["base"]) == ("scraped", "unscraped")
    # As much as the operating system says of the same processes.
    port = int(bounded.url.rpartition(":")[2])
    (listener,) = {
        c.pid
        for c in psutil.net_connections()
        if c.laddr and c.laddr.port == port and c.status == "LISTEN"
    }
    server = psutil.Process(listener)
    resident = sum(p.memory_info().rss for p in [server, *server.children(recursive=True)])
    assert report["memory"]["resident_mb"][-1] == pytest.approx(resident / 2**20, rel=0.1)


def test_a_ramp_starts_from_the_measured_rate(bounded: Server, tmp_path: Path) -> None:
    report = played(
        bounded,
        tmp_path,
        1,
        arrivals={
            "process": "poisson",
            "saturation": {"streams": QUEUE, "seconds": 2},
            "stages": [0.5, 3],
        },
        prompts={"max_tokens": 64, "ignore_eos": True},
        bars={"throughput_kept": 1, "memory_mb_per_1000": 1e-6},
        duration=2,
    )
    low, high = report["rows"]
    assert report["rate"] > 0
    assert low["requests"] < high["requests"]
    assert high["endings"].get("503 with Retry-After")
    named = {verdict["bar"]: verdict for verdict in report["verdicts"]}
    kept = named["throughput at the last stage over the best: at least 1"]
    assert kept["found"] == f"{report['throughput_kept']:.3f}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": [{"preset": "no-such"}]}, "policy no-such: refused, 400"),
        ({"policies": [{"routing": {"depth": {"skip": {"blocks": [8]}}}}]}, "layer 8"),
        ({"arrivals": {"process": "concurrent", "streams": 1, "rate": 2}}, "rate"),
    ],
)
def test_what_cannot_be_played_is_said_at_once(
    bounded: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        played(bounded, tmp_path, **fields)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["steady", "--url", "http://127.0.0.1:9", "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert "no process of this machine" in capsys.readouterr().err


def test_vllms_load_generator_as_the_documents_have_it(bounded: Server, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    written = (root / "docs" / "load.md").read_text().split("## Cross-check")[1].split("## ")[0]
    program, command = re.findall(r"    BENCH='(.*)'\n((?:    .*\n)+)", written)[0]
    given = shlex.split(command.replace("\\\n", " "))
    assert given[:3] == ["python", "-c", "$BENCH"]
    ours = {
        "http://127.0.0.1:8000": bounded.url,
        "models/offline/demo/weights": str(root / "models" / "offline" / "demo" / "weights"),
        '{"routing": {"preset": "fast"}}': json.dumps({"routing": {"preset": "shallow"}}),
        "40": "12",
    }
    arguments = [ours.get(argument, argument) for argument in given[3:]]
    assert len(set(arguments) & set(ours.values())) == 4
    lines = [json.dumps({"prompt": f"reverse ab{letter}"}) for letter in "cdefghijklmn"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    counted = ("sluice_requests_total", frozenset({("preset", "shallow"), ("outcome", "ok")}))
    before = bounded.samples()[counted]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["completed"], found["total_output_tokens"]) == (12, 12 * 32)
    assert bounded.samples()[counted] - before >= 12
