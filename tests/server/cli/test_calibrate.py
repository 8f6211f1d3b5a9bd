"""`sluice calibrate`: its arguments, its refusals, and that it stops well."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.full_profile import ADAPTER
from support.tiny import make_model

from sluice.models.depth.stream_adapter import StreamAdapter, tensors_of
from sluice.models.offline.calibrate import pipeline
from sluice.models.offline.calibrate.registry import STEPS
from sluice.models.offline.calibrate.workspace import Part, Workspace
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.profile.profile import Profile
from sluice.server.cli import main as cli
from sluice.server.cli.progress import progress_line

PROMPTS = [{"prompt": "copy abcd", "answer": "abcd"}, {"prompt": "sort 3 1 2", "answer": "1 2 3"}]
QUICK = ["--new-tokens", "8"]


def lines(path: Path, examples: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(each) for each in examples) + "\n", encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    return ["sluice", "calibrate", *map(str, arguments)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return lines(tmp_path / "prompts.jsonl", PROMPTS * 4)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", command(*arguments))
    cli.main()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_one_step_writes_a_profile(
    monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "profile"
    run(monkeypatch, "importance", DEMO_MODEL_DIR, "--prompts", prompts, "--out", out, *QUICK)
    first = Profile.load(out)
    assert first.importance is not None
    assert not first.super_experts
    assert first.fields.expert_map is None
    run(monkeypatch, "super-experts", DEMO_MODEL_DIR, "--prompts", prompts, "--out", out, *QUICK)
    both = Profile.load(out)
    assert both.importance == first.importance
    assert both.fields.expert_map is not None
    assert set(both.fields.calibration) == {"importance", "super-experts"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--new-tokens", "0"], "--new-tokens must be at least 1"),
        (["--skip", "nothing"], "invalid choice: 'nothing'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--tasks", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--new-tokens", "100000"], "prompts.jsonl:1: "),
    ],
)
def test_arguments_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    tmp_path: Path,
    arguments: list[str],
    why: str,
) -> None:
    common = [DEMO_MODEL_DIR, "--prompts", prompts, "--out", tmp_path / "profile"]
    assert why in refused(monkeypatch, capsys, *common, *arguments)
    assert not (tmp_path / "profile" / "profile.json").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "the following arguments are required: MODEL, --prompts, --out"),
        (["importance"], "the following arguments are required: MODEL, --prompts, --out"),
        (["x", "--prompts", "y", "--out", "z", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["x", "--prompts", "nowhere.jsonl", "--out", "z"], "nowhere.jsonl: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    why: str,
) -> None:
    (line,) = refused(monkeypatch, capsys, *arguments).splitlines()
    command = "sluice calibrate importance" if arguments == ["importance"] else "sluice calibrate"
    assert line.startswith(f"{command}: error: {why}")


def test_a_wrong_line_of_the_prompts_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = lines(tmp_path / "prompts.jsonl", [PROMPTS[0], {"propmt": "x"}])
    common = [DEMO_MODEL_DIR, "--prompts", path, "--out", tmp_path / "profile"]
    assert f"{path}:2: " in refused(monkeypatch, capsys, *common)


def test_models_that_cannot_be_calibrated(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    tmp_path: Path,
) -> None:
    rest = ["--prompts", prompts, "--out", tmp_path / "profile"]
    nowhere = refused(monkeypatch, capsys, tmp_path / "nowhere", *rest)
    assert "neither a folder nor a model on this machine" in nowhere
    (tmp_path / "empty").mkdir()
    assert "config.json: No such file" in refused(monkeypatch, capsys, tmp_path / "empty", *rest)
    odd = make_model("llama", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["architectures"] = ["GPTNeoXForCausalLM"]
    (odd / "config.json").write_text(json.dumps(config))
    why = refused(monkeypatch, capsys, odd, *rest)
    assert "architecture GPTNeoXForCausalLM is not supported" in why
    dense = make_model("llama", tmp_path / "dense")
    why = refused(monkeypatch, capsys, "super-experts", dense, *rest)
    assert "super-experts: llama has no mixture-of-experts layers" in why
    why = refused(monkeypatch, capsys, "importance", dense, *rest)
    assert "no tokenizer" in why


def test_every_step_and_option_is_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    whole = capsys.readouterr().out
    for step in STEPS:
        text = whole
        if step.only_named:
            assert f"step {step.name}:" not in whole
            with pytest.raises(SystemExit):
                run(monkeypatch, step.name, "--help")
            text = capsys.readouterr().out
        assert f"step {step.name}:" in text
    assert len({step.name for step in STEPS}) == len(STEPS)
    order = [step.name for step in STEPS]
    for step in STEPS:
        assert all(order.index(needed) < order.index(step.name) for needed in step.needs)


def test_a_whole_run_keeps_what_only_its_own_command_finds(
    monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path
) -> None:
    out, shape = tmp_path / "profile", Profile.load(DEMO_PROFILE_DIR)
    adapter = {**ADAPTER, "rank": 1}
    tensors = tensors_of(
        "a", {1: StreamAdapter(torch.ones(1, shape.hidden), torch.ones(shape.hidden, 1))}
    )
    Workspace.beside(out).keep_part("recover", "key", Part({"adapters": {"a": adapter}}, tensors))
    skipped = [step.name for step in STEPS if not step.only_named and step.name != "importance"]
    skips = [word for name in skipped for word in ("--skip", name)]
    run(monkeypatch, DEMO_MODEL_DIR, "--prompts", prompts, "--out", out, *skips, *QUICK)
    found = Profile.load(out)
    assert found.importance is not None
    assert found.adapters("a")[1].up.tolist() == [[1.0]] * shape.hidden


def test_a_full_disk_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    tmp_path: Path,
) -> None:
    def full(folder: Path, **parts: Any) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(pipeline, "write_profile", full)
    out = tmp_path / "profile"
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "importance", DEMO_MODEL_DIR, "--prompts", prompts, "--out", out, *QUICK)
    assert stopped.value.code == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_quick_run_says_how_long_it_takes_and_finds_presets_and_effort(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "profile"
    small = ["--frontier-timed", "2", "--frontier-prompts", "4", "--enforce-eager"]
    common = [DEMO_MODEL_DIR, "--prompts", prompts, "--out", out, "--dtype", "float32", *small]
    run(monkeypatch, *common, "--quick")
    said = capsys.readouterr()
    assert "this takes about " in said.err
    assert "frontier" in said.err.split("this takes about ")[1].splitlines()[0]
    profile = Profile.load(out)
    assert set(profile.fields.calibration) == {"importance", "frontier"}
    assert profile.frontier is not None
    assert profile.frontier.effort
    assert profile.frontier.mode == "eager"
    options = profile.fields.calibration["frontier"].settings
    assert (options["draws"], options["repeats"], options["timed"]) == (0, 6, 2)
    # It goes in a file as well: lines, and no bars.
    assert "\x1b[" not in said.err
    run(monkeypatch, *common, "--quick")
    again = capsys.readouterr().err
    assert "frontier: done before" in again
    assert "this takes about" not in again


def test_how_far_it_is_in_a_line() -> None:
    assert progress_line("points", 3, 12, 60) == "  points: 3 of 12, about 180 s left"
    assert progress_line("points", 3, 0, 60) == "  points: 3 in 60 s"


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_loses_nothing(
    prompts: Path, tmp_path: Path, signal_number: int, status: int
) -> None:
    """A run that is stopped in its second step goes on there."""
    out = tmp_path / "profile"
    sluice = shutil.which("sluice", path=str(Path(sys.executable).parent))
    assert sluice is not None
    arguments = [sluice, "calibrate", str(DEMO_MODEL_DIR), "--prompts", str(prompts)]
    arguments += ["--out", str(out), *QUICK]
    for step in STEPS:
        if step.name not in ("importance", "heads") and not step.only_named:
            arguments += ["--skip", step.name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background jobs ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    done = out / ".calibration" / "importance.json"
    deadline = time.monotonic() + 300
    while not done.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal_number)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == status, errors
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    assert not (out / "profile.json").exists()
    again = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    assert "importance: done before" in again.stderr
    assert set(Profile.load(out).fields.calibration) == {"importance", "heads"}
