"""`sluice eval` of a model in this process, against the same through a server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import run_command
from support.serving import Server
from vllm.platforms.cpu import CpuPlatform

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.tasks.tasks import longer_items
from sluice.models.profile.writer import write_profile
from sluice.server.cli.evaluate import add_parser


def evaluate(*arguments: str | Path) -> int | str | None:
    return run_command(add_parser, "eval", *arguments)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM takes the first of these types for a model in fp32, which is bfloat16 otherwise."""
    monkeypatch.setattr(CpuPlatform, "supported_dtypes", [torch.float32])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in fp32, as the server of these tests runs it."""
    folder = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(DEMO_MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


PRESETS = """
presets:
  shallow:
    depth: {skip: {blocks: [4, 5]}, phase: decode}
  leave-early:
    depth: {exit: {method: confidence, threshold: 0.9, layers: [3, 5]}}
"""


def engine_environment() -> dict[str, str]:
    """Variables that vLLM or Sluice reads; PyTorch sets some of its own when it is first used."""
    return {name: os.environ[name] for name in os.environ if name.startswith(("VLLM_", "SLUICE_"))}


def test_the_same_rows_as_through_a_server(
    server: Server, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With prompts, texts and choices of which full depth and the presets get some wrong."""
    lines: list[dict[str, Any]] = []
    for task in ("count", "lookup"):
        for item in longer_items(task, 5, 6):
            lines.append({"prompt": item.prompt, "answer": item.answer, "task": task})
    for item in longer_items("count", 6, 6):
        text = f"<|user|>{item.prompt}<|assistant|>"
        choices = sorted({item.answer, "3", "4", "5"})
        lines.append({"text": text, "answer": item.answer, "choices": choices, "task": "choose"})
    # Longer than a block of the K/V cache, which the first choice leaves to the others.
    lines.append({"text": text * 12, "answer": "4", "choices": ["3", "4", "5"], "task": "choose"})
    tasks = write(tmp_path / "tasks.jsonl", *lines)
    presets = tmp_path / "presets.yaml"
    presets.write_text(PRESETS)
    skip = '{"depth": {"skip": {"blocks": [4, 5, 6, 7]}}}'
    refused = '{"depth": {"skip": {"blocks": [9]}}}'
    names = ("none", "shallow", "leave-early", skip, refused)
    policies = [part for name in names for part in ("--policy", name)]
    files = [tmp_path / "served.json", tmp_path / "here.json"]
    url = ["--url", f"{server.url}/v1", "--api-key", server.api_key]
    here = ["--model", model, "--presets", presets, "--concurrency", "4"]
    shown, environment = [], engine_environment()
    for where, file in zip((url, here), files, strict=True):
        assert evaluate(*where, "--tasks", tasks, *policies, "--json", file) == 2
        shown.append(capsys.readouterr())
    assert engine_environment() == environment
    served, own = (json.loads(file.read_text()) for file in files)
    assert len({json.dumps(row["tasks"]) for row in own}) > 1, "policies differ"
    for theirs, mine in zip(served, own, strict=True):
        for key in ("policy", "routing", "tasks", "interval", "warnings", "generated_tokens"):
            assert mine[key] == theirs[key], key
        for key in ("mean_layers", "compute_fraction", "generated_compute_fraction"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-6), key
    for text in (
        "policy shallow: depth.skip acts",
        "policy leave-early: depth.exit acts",
        f"policy {refused}: routing.depth.skip.blocks.0: layer 9 does not exist",
    ):
        assert all(text in part.err for part in shown)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "nowhere"), "nowhere: neither a folder nor a model"),
        (("--model", "{model}", "--profile", "{tmp}"), "profile.json: No such file"),
        (("--model", "{model}", "--presets", "{tmp}/x.yaml"), "x.yaml"),
    ],
)
def test_files_that_are_not_there(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    tasks = write(tmp_path / "tasks.jsonl", {"prompt": "a", "answer": "b"})
    formatted = [each.format(model=model, tmp=tmp_path) for each in arguments]
    assert evaluate("--tasks", tasks, *formatted) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a" * 1000, "answer": "b"},
        {"prompt": "a" * 1010, "answer": "bcdefghijklmnop", "choices": ["b", "bcdefghijklmnop"]},
    ],
)
def test_a_prompt_over_the_context_names_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any]
) -> None:
    tasks = write(tmp_path / "tasks.jsonl", {"prompt": "a", "answer": "b"}, line)
    assert evaluate("--model", model, "--tasks", tasks) == 2
    assert "tasks.jsonl:2: 10" in capsys.readouterr().err


def test_messages_need_a_chat_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    said = {"messages": [{"role": "user", "content": "a"}], "answer": "b"}
    tasks = write(tmp_path / "tasks.jsonl", {"prompt": "a", "answer": "b"}, said)
    assert evaluate("--model", bare, "--tasks", tasks) == 2
    assert "tasks.jsonl:2: " in (error := capsys.readouterr().err)
    assert "messages need a chat template" in error


def test_a_profile_of_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write(tmp_path / "tasks.jsonl", {"prompt": "a", "answer": "b"})
    shape = {"layers": 8, "hidden": 128, "fingerprint": "0" * 64}
    write_profile(tmp_path / "profile", {"model": shape}, {}, {})
    assert evaluate("--model", model, "--tasks", tasks, "--profile", tmp_path / "profile") == 2
    assert "with fingerprint 000000000000" in capsys.readouterr().err
