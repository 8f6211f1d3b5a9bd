"""The examples do what their docstrings say, run as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import Server, running_server

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_SECONDS = 600


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, as the examples serve it themselves."""
    log = tmp_path_factory.mktemp("demo") / "log"
    with running_server(log, "--enforce-eager", "--dtype", "float32") as running:
        yield running


def lines_of(script: str, *arguments: str) -> list[str]:
    """What an example prints; it must end with 0."""
    # What conftest.py sets for engines inside the test process is not for servers.
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / script, *arguments],
        env={key: value for key, value in os.environ.items() if key not in ours},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, log = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # The server that it started, too.
        raise
    assert process.returncode == 0, out + log
    return out.splitlines()


def test_first_requests(demo: Server) -> None:
    lines = lines_of("first_requests.py", "--url", demo.url)
    assert [line.split("  ")[0] for line in lines] == [
        "full depth",
        "without blocks 6 and 7",
        "leave once sure",
        "two experts a token",
    ]
    assert all("1 2 4 5 9" in line for line in lines)
    shares = [float(share) for share in re.findall(r"([\d.]+)% of full depth", "\n".join(lines))]
    assert shares[0] == 100
    # Two of the eight blocks, and all of the LM head.
    assert 75 < shares[1] < 76
    assert all(0 < share < 100 for share in shares[2:])


def test_sweep(demo: Server) -> None:
    header, *rows = lines_of("sweep.py", "--url", demo.url)
    assert header.split() == ["effort", "right", "compute", "of", "the", "answers", "tokens/s"]
    found = [re.fullmatch(r" *([\d.]+) +(\d+) of (\d+) +([\d.]+)% +(\d+)", row) for row in rows]
    assert all(found), rows
    columns = [tuple(map(float, row.groups())) for row in found if row]
    efforts, right, items, compute, speed = zip(*columns, strict=True)
    assert efforts == (1, 0.75, 0.625, 0.5, 0.375)
    assert right[0] == items[0] == 26
    assert compute == tuple(sorted(compute, reverse=True))
    assert compute[0] == 100
    assert all(one > 0 for one in speed)


def test_calibrate_and_serve() -> None:
    answer, left_out, compute = lines_of("calibrate_and_serve.py")[-3:]
    assert answer == "answer at effort 0.75: 60"
    layers = re.fullmatch(
        r"attention left out in layers \[(\d), (\d)\], MLP in layers \[\1, \2\]", left_out
    )
    # Measured: nothing is lost without them, and the first layers do most of the work.
    assert layers is not None
    assert all(int(layer) >= 4 for layer in layers.groups())
    share = re.fullmatch(r"compute of the answer: ([\d.]+)% of full depth's", compute)
    assert share is not None
    assert 75 < float(share[1]) < 76  # All of the LM head.


def test_load_test(demo: Server) -> None:
    *rows, missed = lines_of("load_test.py", "--url", demo.url)[-4:]
    found = [
        re.fullmatch(r"(.+?) +(\d+) answered, first token after (\d+) ms", row) for row in rows
    ]
    assert all(found), rows
    assert sorted(row[1] for row in found if row) == ["full depth", "half", "two experts"]
    assert all(int(row[2]) > 0 for row in found if row)
    assert missed == "bars missed: []"
