"""Steps in order, kept as they are done, and the profile in the end."""

from __future__ import annotations

import errno
import math
from dataclasses import astuple, dataclass, replace
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration_of
from support.tiny import LAYERS, make_model

from sluice.models.offline.calibrate import pipeline, step, workspace
from sluice.models.offline.calibrate.estimate import Pace, duration, estimate, in_words
from sluice.models.offline.calibrate.frontier.frontier import Frontier
from sluice.models.offline.calibrate.pipeline import open_workspace, run_steps
from sluice.models.offline.calibrate.step import Calibration, Step, option
from sluice.models.offline.calibrate.workspace import FOLDER, Part, Workspace
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import JSON_NAME

RAN: list[str] = []


@dataclass(frozen=True)
class Saturation(Step):
    name = "first"
    help = "a number a layer"
    value: float = option(0.5, "the number")

    def run(self, calibration: Calibration) -> Part:
        RAN.append(self.name)
        return Part({"saturation": [self.value] * calibration.model.layers})


@dataclass(frozen=True)
class Doubled(Step):
    name = "second"
    help = "twice that, and a head"
    needs = ("first",)
    fails: bool = option(False, "stop in the middle")

    def run(self, calibration: Calibration) -> Part:
        RAN.append(self.name)
        if self.fails:
            raise KeyboardInterrupt
        held = calibration.parts["first"].fields["saturation"]
        width = calibration.model.hidden
        heads = {"classifier.weight": torch.ones(width), "classifier.bias": torch.zeros(())}
        return Part({"skip_ratios": [2 * value for value in held]}, heads)


@dataclass(frozen=True)
class Clash(Saturation):
    name = "third"


@pytest.fixture
def llama(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "pipeline-llama")


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


def started(model: Path, out: Path, **changes: Any) -> Calibration:
    """A run of the command: nothing is remembered but what is in the folder."""
    calibration = calibration_of(model, [(1, 2, 3), (4, 5)], out, new_tokens=3)
    calibration = replace(calibration, workspace=Workspace.beside(out), parts={}, **changes)
    open_workspace(calibration, out)
    return calibration


def quiet(line: str) -> None:
    pass


def test_a_profile_of_all_parts(llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    calibration = started(llama, tmp_path)
    profile = run_steps(calibration, [Saturation(), Doubled()], tmp_path, lines.append)
    assert profile.fields.saturation == (0.5,) * LAYERS
    assert profile.fields.skip_ratios == (1.0,) * LAYERS
    assert profile.methods == {"classifier"}
    assert profile.fields.calibration["first"].settings == {"value": 0.5}
    assert profile.fields.calibration["second"].examples == 2
    assert profile.fields.model.name == calibration.model.folder.name
    for made in profile.fields.calibration.values():
        assert date.fromisoformat(made.date or "") <= datetime.now(UTC).date()
        assert made.versions["torch"] == version("torch")
    profile.check_model(LAYERS, 64, calibration.model.fingerprint)
    assert lines == ["first: a number a layer", "second: twice that, and a head"]


def test_what_is_done_is_not_done_again(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_steps(started(llama, tmp_path), [Saturation(), Doubled(fails=True)], tmp_path, quiet)
    assert not (tmp_path / JSON_NAME).exists()
    lines: list[str] = []
    run_steps(started(llama, tmp_path), [Saturation(), Doubled()], tmp_path, lines.append)
    assert RAN == ["first", "second", "second"]
    assert lines[0] == "first: done before"
    once = Profile.load(tmp_path)
    run_steps(started(llama, tmp_path), [Saturation(), Doubled()], tmp_path, quiet)
    assert RAN == ["first", "second", "second"]
    assert Profile.load(tmp_path).fields == once.fields
    assert torch.equal(once.tensors("classifier")["weight"], torch.ones(64))


@pytest.mark.parametrize("change", ["option", "seed", "prompts", "new_tokens"])
def test_another_setting_is_another_result(llama: Path, tmp_path: Path, change: str) -> None:
    run_steps(started(llama, tmp_path), [Saturation(), Doubled()], tmp_path, quiet)
    again = started(llama, tmp_path)
    first = Saturation()
    if change == "option":
        first = Saturation(value=0.25)
    elif change == "seed":
        again = replace(again, seed=again.seed + 1)
    elif change == "new_tokens":
        again = replace(again, new_tokens=2)
    else:
        again = replace(again, prompts=again.prompts[:1])
    RAN.clear()
    profile = run_steps(again, [first, Doubled()], tmp_path, quiet)
    # The second step reads what the first found.
    assert RAN == ["first", "second"]
    assert profile.fields.skip_ratios == (2 * first.value,) * LAYERS


def test_a_step_that_reads_only_what_did_not_change_stays(llama: Path, tmp_path: Path) -> None:
    run_steps(started(llama, tmp_path), [Saturation(), Doubled()], tmp_path, quiet)
    tasks = started(llama, tmp_path).prompts
    RAN.clear()
    run_steps(started(llama, tmp_path, tasks=tasks), [Saturation(), Doubled()], tmp_path, quiet)
    assert RAN == []


def test_two_steps_cannot_give_one_field(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="step third: saturation was given before"):
        run_steps(started(llama, tmp_path), [Saturation(), Clash()], tmp_path, quiet)


def test_a_folder_of_another_model_is_refused(
    llama: Path, models_folder: Path, tmp_path: Path
) -> None:
    started(llama, tmp_path)
    other = make_model("llama", models_folder / "pipeline-other", rms_norm_eps=1e-4)
    with pytest.raises(CalibrationError, match="the calibration of the model with fingerprint"):
        started(other, tmp_path)


def test_a_profile_from_elsewhere_is_not_written_over(llama: Path, tmp_path: Path) -> None:
    run_steps(started(llama, tmp_path), [Saturation()], tmp_path, quiet)
    held = (tmp_path / JSON_NAME).read_bytes()
    for file in (tmp_path / FOLDER).iterdir():
        file.unlink()
    with pytest.raises(CalibrationError, match="choose another folder"):
        started(llama, tmp_path)
    assert (tmp_path / JSON_NAME).read_bytes() == held


def test_a_full_disk_loses_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps(started(llama, tmp_path), [Saturation()], tmp_path, quiet)
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(workspace, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        run_steps(started_without_writing(llama, tmp_path), [Doubled()], tmp_path, quiet)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == held
    monkeypatch.undo()
    run_steps(started(llama, tmp_path), [Saturation(), Doubled()], tmp_path, quiet)
    assert Profile.load(tmp_path).fields.skip_ratios == (1.0,) * LAYERS


def started_without_writing(model: Path, out: Path) -> Calibration:
    calibration = calibration_of(model, [(1, 2, 3), (4, 5)], out, new_tokens=3)
    part = Workspace(out / FOLDER).latest_part("first")
    assert part is not None
    return replace(calibration, workspace=Workspace(out / FOLDER), parts={"first": part})


def test_the_workspace_is_named_as_the_pipeline_reads_it(llama: Path, tmp_path: Path) -> None:
    started(llama, tmp_path)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {f"{pipeline._MODEL}.json"}


def test_a_stop_between_two_files_leaves_the_result_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Workspace(tmp_path)
    held.keep_part("heads", "one", Part({"n": 1}, {"q_exit.w": torch.ones(2)}))
    write_whole = workspace.write_whole

    def stopped(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write_whole(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(workspace, "write_whole", stopped)
        with pytest.raises(KeyboardInterrupt):
            held.keep_part("heads", "two", Part({"n": 2}, {"q_exit.w": torch.zeros(2)}))
    assert held.part("heads", "two") is None
    before = held.part("heads", "one")
    assert before is not None
    assert before.fields == {"n": 1}
    assert before.heads["q_exit.w"].tolist() == [1.0, 1.0]
    held.keep_part("heads", "three", Part({"n": 3}, {"q_exit.w": torch.zeros(2)}))
    after = held.latest_part("heads")
    assert after is not None
    assert after.heads["q_exit.w"].tolist() == [0.0, 0.0]
    assert held.part("heads", "one") is None


def test_answers_are_kept_as_they_come(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each length of a prompt is a part, and a run that was stopped asks for the missing ones."""
    prompts = [(1, 2, 3), (4, 5), (6, 7), (8,)]
    whole = calibration_of(llama, prompts, tmp_path / "whole", new_tokens=3).samples
    real, asked = step.continued, []

    def stopping(model: Any, given: Any, new_tokens: int) -> Any:
        for places, samples in real(model, given, new_tokens):
            asked.append([samples[0].prompt for _ in places])
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield places, samples

    monkeypatch.setattr(step, "continued", stopping)
    with pytest.raises(KeyboardInterrupt):
        _ = calibration_of(llama, prompts, tmp_path / "cut", new_tokens=3).samples
    assert calibration_of(llama, prompts, tmp_path / "cut", new_tokens=3).samples == whole
    assert [len(part) for part in asked] == [1, 2, 1, 1]


def test_how_an_engine_runs_is_part_of_what_speed_depends_on(llama: Path, tmp_path: Path) -> None:
    given = started(llama, tmp_path)
    compiled = replace(given, eager=False)
    assert given.key(Frontier()) != compiled.key(Frontier())
    assert given.key(Saturation()) == compiled.key(Saturation())


def test_an_estimate_has_every_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(started(llama, tmp_path), eager=True)
    assert min(astuple(Pace.of(given))) > 0
    monkeypatch.setattr(Pace, "of", lambda _calibration: Pace(read=2.0, answer=0.5, answers=3.0))
    found = estimate(given, [Saturation(), Frontier()])
    assert [*found] == ["answers", "first", "frontier"]
    assert (found["answers"], found["first"]) == (3.0, 2.0)
    compiled = estimate(replace(given, eager=False), [Frontier()])
    assert found["frontier"] < compiled["frontier"]
    # A repeat times each setting and full depth once more.
    more = estimate(given, [Frontier(repeats=Frontier().repeats + 1)])
    batches = math.ceil(min(Frontier().timed, len(given.prompts)) / Frontier().batch)
    assert more["frontier"] - found["frontier"] == pytest.approx(20 * 2 * batches * 0.5)
    said = in_words({"answers": 30.0, "frontier": 600.0})
    assert said == "this takes about 10 min on a quiet machine (answers 30 s, frontier 10 min)"
    assert duration(10_000) == "2.8 h"
