"""The runner against guidellm's own mock server, whose times are known."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.serving import free_port

from sluice.loadtest.__main__ import main

TTFT_MS, ITL_MS, TOKENS = 60, 30, 6
FAILS_AFTER = 12
SCENARIO: dict[str, Any] = {
    "description": "against the mock server",
    "seed": 3,
    "duration": 3,
    "warm_up": 0,
    "memory": False,
    "metrics": False,
    "arrivals": {"process": "constant", "rate": 4},
    "prompts": {"max_tokens": TOKENS},
    "objectives": {"ttft_ms": 10000},
}


@contextmanager
def mock_server(*arguments: str) -> Iterator[str]:
    port = free_port()
    pace = ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS), "--output-tokens", str(TOKENS)]
    command = [str(Path(sys.executable).parent / "guidellm"), "mock-server", "--model", "mock"]
    process = subprocess.Popen(
        [*command, "--port", str(port), *pace, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def played(url: str, folder: Path, **fields: Any) -> tuple[int, dict[str, Any]]:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SCENARIO, **fields}))
    status = main([str(path), "--url", url, "--out", str(folder)])
    return status, json.loads((folder / "mine" / "report.json").read_text())


def test_times_are_the_servers(tmp_path: Path) -> None:
    with mock_server() as url:
        status, report = played(url, tmp_path)
    assert status == 0
    (row,) = report["rows"]
    assert row["endings"] == {"answered": 12}
    assert row["tokens"] == 12 * TOKENS
    assert row["good"] == 12
    # Never quicker than the server waits; how much slower is the machine's affair.
    assert row["times"]["ttft_ms"]["p50"] >= TTFT_MS
    assert row["times"]["tpot_ms"]["p50"] >= 0.9 * ITL_MS
    assert row["times"]["e2el_ms"]["p50"] >= TTFT_MS + 0.9 * ITL_MS * (TOKENS - 1)
    assert report["left"] == {"seconds": 0}
    assert report["metrics"] == []
    with (tmp_path / "mine" / "requests.csv").open(newline="") as file:
        requests = list(csv.DictReader(file))
    due = [float(each["due"]) for each in requests]
    assert [later - due[0] for later in due] == pytest.approx([i / 4 for i in range(12)], abs=1e-3)
    assert all(float(each["start"]) >= float(each["due"]) for each in requests)
    assert all(each["prompt"] for each in requests)


def test_a_server_that_fails_misses_a_bar(tmp_path: Path) -> None:
    with mock_server("--fail-after-requests", str(FAILS_AFTER)) as url:
        arrivals = {"process": "constant", "rate": 8}
        status, report = played(url, tmp_path, arrivals=arrivals)
    assert status == 1
    # The first request tries the policy.
    assert report["rows"][0]["endings"] == {
        "answered": FAILS_AFTER - 1,
        "500 without Retry-After": 24 - FAILS_AFTER + 1,
    }
    missed = [verdict["bar"] for verdict in report["verdicts"] if not verdict["met"]]
    assert missed == ["no other server error"]
