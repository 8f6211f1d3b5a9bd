"""The demo model's files for `sluice calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sluice.models.offline.demo import calibration
from sluice.models.offline.demo.calibration import ANSWERED, REFUSED
from sluice.models.offline.demo.tasks import facts
from sluice.models.offline.demo.tasks.tasks import TASKS, is_heldout
from sluice.models.offline.hf_model.examples import digest, read_examples, read_tasks


def files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, prompts: int = 12, tasks: int = 5
) -> tuple[Path, Path]:
    folder.mkdir()
    paths = folder / "prompts.jsonl", folder / "tasks.jsonl"
    arguments = ["calibration", "--prompts", str(paths[0]), "--tasks", str(paths[1])]
    arguments += ["--seed", str(seed)]
    arguments += ["--prompts-per-task", str(prompts), "--tasks-per-task", str(tasks)]
    monkeypatch.setattr(sys, "argv", arguments)
    calibration.main()
    return paths


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = files(tmp_path / "a", monkeypatch, 3)
    prompts, tasks = read_examples(first), read_tasks(second)
    assert [each.task for each in prompts] == [*TASKS] * 12
    assert [each.task for each in tasks] == [*TASKS] * 5
    asked = [each.prompt for each in (*prompts, *tasks)]
    assert len(set(asked)) == len(asked)
    assert not any(is_heldout(prompt or "") for prompt in asked)
    for each in (*prompts, *tasks):
        assert each.label == (REFUSED if each.answer == facts.REFUSAL else ANSWERED)
    assert {each.label for each in prompts} == {REFUSED, ANSWERED}


def test_the_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, again, other = (
        digest(read_examples(files(tmp_path / name, monkeypatch, seed)[0]))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one == again != other


def test_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        files(tmp_path / "a", monkeypatch, 3, prompts=0)
    assert "must be at least 1" in capsys.readouterr().err
