"""What cannot be served is said in one line, with status 2, before an engine starts."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.profile.profile import ProfileError
from sluice.models.routing.presets import PresetsFileError
from sluice.server.cli import serve
from sluice.server.cli.serve_checks import RUNNER_ENV

DEMO = str(DEMO_MODEL_DIR)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`sluice serve` sets variables and handles signals for the whole process."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    # conftest.py sets them for engines in this process.
    for name in (RUNNER_ENV, "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "handle_ctrl_c", lambda: None)
    yield monkeypatch
    monkeypatch.undo()
    signal.signal(signal.SIGINT, handler)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refusal(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Any:
    """Gives the message of `sluice serve ARGUMENTS`; no engine must start."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def start(args: object) -> None:
        pytest.fail("an engine would start")

    environment.setattr(ServeSubcommand, "cmd", staticmethod(start))
    environment.chdir(tmp_path)

    def message(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            serve.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert said.out == ""
        (line,) = said.err.splitlines()
        prefix = "sluice serve: error: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    return message


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("./nowhere", "./nowhere: no such folder"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("some/folder/below", "some/folder/below: no such folder"),
        ("build/nowhere", "build/nowhere: neither a folder nor a model on this machine"),
        ("nowhere", "nowhere: neither a folder nor a model on this machine"),
        (".", ".: no config.json: not the folder of a model"),
    ],
)
def test_a_model_that_is_not_there(refusal: Any, model: str, why: str) -> None:
    assert refusal(model).startswith(why)


def test_a_port_in_use(refusal: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert refusal("--port", port) == (
            f"host 127.0.0.1, port {port}: in use: another server may run there"
        )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--port", "70000"], "host 127.0.0.1, port 70000: "),
        (["--port", "x"], "argument --port: "),
        (["--host", "192.0.2.1"], "host 192.0.2.1, port 8000: Cannot assign requested address"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--grpc"], "--grpc is not supported"),
    ],
)
def test_arguments_that_do_not_fit(refusal: Any, arguments: list[str], why: str) -> None:
    assert refusal(*arguments).startswith(why)


def test_a_socket_file_that_cannot_be(refusal: Any, tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "no" / "folder.sock", "No such file or directory"),
        (tmp_path / ("long" * 40), "AF_UNIX path too long"),
    ):
        assert refusal("--uds", path) == f"--uds {path}: {why}"
    taken = tmp_path / "taken.sock"
    taken.touch()
    assert refusal("--uds", taken) == f"--uds {taken}: in use: another server may run there"
    assert taken.exists()


def test_files_that_are_wrong(refusal: Any, tmp_path: Path) -> None:
    presets, keys = tmp_path / "presets.yaml", tmp_path / "keys.yaml"
    assert refusal("--presets", presets).startswith(f"presets file {presets}: ")
    presets.write_text("presets: {a: [\n")  # YAML's own error has several lines.
    assert refusal("--presets", presets).startswith(f"presets file {presets}: ")
    presets.write_text("presets: {a: {effort: 2}}")
    assert refusal("--presets", presets).startswith(f"presets file {presets}.presets.a.effort: ")
    keys.write_text("keys: []")
    assert str(keys) in refusal("--keys", keys)
    assert str(tmp_path / "none.yaml") in refusal("--keys", tmp_path / "none.yaml")
    assert str(tmp_path / "profile") in refusal("--profile", tmp_path / "profile")


def test_a_runner_that_this_machine_has_not(refusal: Any, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(RUNNER_ENV, "1")
    needed = "vLLM's V2 runner needs a Triton for this machine"
    assert refusal(DEMO) == f"{RUNNER_ENV}=1: {needed}"


@pytest.mark.parametrize("error", [PresetsFileError, ProfileError])
def test_what_only_the_engine_finds_is_said_in_one_line_too(
    refusal: Any, environment: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    def start(args: object) -> None:
        raise error("presets.few.experts.top_k: the model has 16 experts")

    environment.setattr(ServeSubcommand, "cmd", staticmethod(start))
    assert refusal(DEMO, "--port", 0) == "presets.few.experts.top_k: the model has 16 experts"


def test_what_can_be_served_starts(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks let through what is right, and a free port and its socket are free afterwards."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    started: list[Any] = []

    def start(args: Any) -> None:
        started.append(args)
        with socket.socket() as server:
            server.bind((args.host, args.port))

    environment.setattr(ServeSubcommand, "cmd", staticmethod(start))
    serve.main([DEMO, "--port", "0"])
    serve.main([DEMO, "--port", "0", "--uds", str(tmp_path / "a.sock")])
    assert started[0].port > 0
    assert (started[0].quiet, started[0].uvicorn_log_level) == (True, "info")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["0"], "argument --group-by-depth: 0 is not a number of seconds above 0"),
        (["inf"], "argument --group-by-depth: inf is not a number of seconds above 0"),
        (["nan"], "argument --group-by-depth: nan is not a number of seconds above 0"),
        (["soon"], "argument --group-by-depth: invalid seconds value: 'soon'"),
        (
            ["2", "--scheduler-cls", "mine.Scheduler"],
            "give either --group-by-depth or --scheduler-cls, not both",
        ),
        (
            ["2", "--scheduling-policy", "priority"],
            "--group-by-depth needs --scheduling-policy fcfs, not priority",
        ),
    ],
)
def test_an_order_that_is_not_ours_to_choose(refusal: Any, arguments: list[str], why: str) -> None:
    assert refusal(DEMO, "--group-by-depth", *arguments) == why
