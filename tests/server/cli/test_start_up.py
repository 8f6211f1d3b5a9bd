"""What a user sees of `sluice serve`: its help, its start, and its end by Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sluice.server.cli import serve

SLUICE = str(Path(sys.executable).parent / "sluice")
START_LIMIT_SECONDS = 300
STOP_LIMIT_SECONDS = 60
READY = re.compile(r"^Sluice \S+ - demo - (?P<url>\S+) - console (?P<console>\S+) - \d+ presets$")
INFORMATION = re.compile(r"\bINFO\b")


def environment() -> dict[str, str]:
    """A user's: conftest.py sets variables for engines in the test process."""
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_LOGGING_LEVEL")
    return {key: value for key, value in os.environ.items() if key not in ours}


class Running:
    """A server, and all that it and its processes say."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def ready(self) -> re.Match[str]:
        """The line that says so, once it is there."""
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.lines:
                if found := READY.match(line):
                    return found
            time.sleep(0.02)
        pytest.fail(f"no line says that the server is ready:\n{self._log.read_text()[-4000:]}")

    def ctrl_c(self) -> None:
        """As a terminal does it: every process of the group gets the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def status(self) -> int:
        return self.process.wait(STOP_LIMIT_SECONDS)


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Running]:
    command = [SLUICE, "serve", "--enforce-eager", "--port", "0", "--console", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            # A shell's background jobs ignore the signal, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            yield Running(process, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def fetched(url: str) -> int:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return int(answer.status)


def test_it_starts_quietly_says_that_it_answers_and_ends_quietly(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as running:
        found = running.ready()
        assert fetched(f"{found['url']}/health") == 200
        assert fetched(f"{found['console']}/") == 200
        said = running.lines
        assert READY.match(said[-1]) or "GET /" in said[-1]
        before = [line for line in said if "GET /" not in line]
        assert READY.match(before[-1])
        assert not [line for line in before if INFORMATION.search(line)]
        running.ctrl_c()
        running.ctrl_c()
        time.sleep(0.3)
        running.ctrl_c()
        assert running.status() == 0
        assert not [line for line in running.lines if "Traceback" in line]
    assert [line for line in running.lines if "GET /health" in line]


def test_several_api_servers_say_it_once(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--api-server-count", "2", "--verbose") as running:
        found = running.ready()
        assert fetched(f"{found['url']}/health") == 200
        deadline = time.monotonic() + START_LIMIT_SECONDS
        complete = "Application startup complete"
        while sum(complete in line for line in running.lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        assert sum(bool(READY.match(line)) for line in running.lines) == 1
        assert sum(bool(INFORMATION.search(line)) for line in running.lines) > 50
        running.ctrl_c()
        # vLLM may log, by a traceback, that an API server lost the engine before it ended itself.
        assert running.status() == 0


@pytest.mark.parametrize("stage", ["importing", "the engine"])
def test_ctrl_c_while_it_starts_is_quiet(tmp_path: Path, stage: str) -> None:
    with serving(tmp_path / "log", *(["--verbose"] if stage == "the engine" else [])) as running:
        if stage == "importing":
            time.sleep(3)
        deadline = time.monotonic() + START_LIMIT_SECONDS
        while stage == "the engine" and time.monotonic() < deadline:
            if any("EngineCore" in line for line in running.lines):
                break
            time.sleep(0.05)
        running.ctrl_c()
        time.sleep(0.3)
        running.ctrl_c()
        assert running.status() == 130
        said = running.lines
    assert not [line for line in said if "Traceback" in line or "ERROR" in line]
    assert stage == "the engine" or said == []


def test_a_missing_folder_is_said_in_one_line() -> None:
    ended = subprocess.run(
        [SLUICE, "serve", "./nowhere"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "sluice serve: error: ./nowhere: no such folder\n"


def test_the_first_page_of_help_has_our_flags_first_and_loads_no_vllm() -> None:
    program = (
        "import sys; from sluice.server.cli.main import main; sys.argv = ['sluice', 'serve', "
        "'--help']; main(); print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    page = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first, _, often = page.stdout.partition("often used flags of vLLM:")
    assert page.stdout.endswith("\n[]\n")
    for flag in ("--presets FILE", "--profile FOLDER", "--keys FILE", "--console", "--verbose"):
        assert flag in first
    parser = serve.build_parser()
    ours = next(group for group in parser._action_groups if group.title == "sluice")
    for action in ours._group_actions:
        assert action.option_strings[0] in first
    for flag, _, _ in serve.VLLM_FLAGS:
        assert flag in often
        assert flag in parser._option_string_actions


def test_help_can_be_asked_for_all_flags_and_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = serve.build_parser()
    for asked, listed in (
        ("--help=all", "--gpu-memory-utilization"),
        ("--help=kv-cache", "--kv-cache-"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([asked])
        assert stopped.value.code == 0
        assert listed in capsys.readouterr().out
