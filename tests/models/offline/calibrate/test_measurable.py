"""Whether full depth is measurable is known before any step is begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts, example_of, plain_model
from support.tiny import make_model

from sluice.models.offline.calibrate.frontier.measure import SettingMeasure
from sluice.models.offline.calibrate.items import Items, Task
from sluice.models.offline.calibrate.measurable import check_measurable
from sluice.models.offline.calibrate.pipeline import engine_of, run_steps
from sluice.models.offline.calibrate.step import Calibration, Step
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.evaluate.choices import likeliest
from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet

PROMPTS = drawn_prompts(4, seed=8)
CHOICES = drawn_prompts(12, seed=9, low=2, high=6)
SKIP = SkipSet.of(blocks=(1, 3), phase=Phase.DECODE)


@pytest.fixture
def llama(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "measurable")


def words(ids: Sequence[int]) -> str:
    return " " + " ".join(map(str, ids))


def log_probs(folder: Path, prompt: Sequence[int], choice: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logits = plain_model(folder)(torch.tensor([[*prompt, *choice]])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(rows, choice, strict=True)]


def choice_tasks(folder: Path) -> tuple[Example, ...]:
    """Three choices each; the likeliest is right, but for the last task."""
    tasks = []
    for n, prompt in enumerate(PROMPTS):
        choices = CHOICES[3 * n : 3 * n + 3]
        best = likeliest([log_probs(folder, prompt, each) for each in choices], per_token=False)
        right = (best + 1) % 3 if n == 3 else best
        texts = tuple(map(words, choices))
        tasks.append(example_of(prompt, choices=texts, answer=texts[right]))
    return tuple(tasks)


def calibration(folder: Path, out: Path, tasks: Sequence[Example] = ()) -> Calibration:
    return calibration_of(folder, PROMPTS, out, tasks=tasks)


def test_choices_are_scored_by_log_likelihood(llama: Path, tmp_path: Path) -> None:
    """By the choice's tokens as generated ones: no free answer could be equal to a choice."""
    tasks = choice_tasks(llama)
    given = calibration(llama, tmp_path, tasks)
    check_measurable(given)
    items = Items.of(given, 4, 4)
    assert items.measure == "choices"
    assert Items.of(calibration(llama, tmp_path / "x", [*tasks, example_of([1], answer="1")]), 5, 4)
    with engine_of(given, items.longest, 6) as engine:
        measure = SettingMeasure(given, engine, items, 3, 3)
        assert measure.full.value == pytest.approx(3 / 4)
        changed = measure.quality(RoutingPolicy(SKIP))
        assert changed.tokens is not None
        assert measure.full.tokens is not None
        assert changed.tokens.divergence > measure.full.tokens.divergence
        noise = measure.noise()
    assert noise.agreement.value > 0.9
    assert measure.full.normalised is not None


def test_normalised_is_per_character() -> None:
    task = Task((1,), "a long answer", ("no", "a long answer"), ((1,), (2, 3, 4)))
    assert task.right([[-2.0], [-1.0, -1.0, -1.0]]) == (False, True)


@dataclass(frozen=True)
class Long(Step):
    name = "long"
    help = "takes half an hour"
    reads_tasks = True

    def run(self, calibration: Calibration) -> Part:
        raise AssertionError("begun")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([example_of([1, 2], answer="none")], "none of the tasks right, of 1 that were tried"),
        (
            [example_of([1, 2], choices=(" 3", " 4"), answer=" 3")],
            "no choice of the tasks has a second token",
        ),
        (
            [example_of([1, 2], choices=(" 3 4", " " * 2), answer=" 3 4")],
            "has no tokens",
        ),
    ],
)
def test_nothing_is_begun_that_cannot_be_measured(
    llama: Path, tmp_path: Path, tasks: list[Example], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        run_steps(calibration(llama, tmp_path, tasks), [Long()], tmp_path, lambda _line: None)


def test_answers_of_one_token_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = calibration_of(llama, PROMPTS, tmp_path, new_tokens=1)
    with pytest.raises(CalibrationError, match="no answer has a second token"):
        check_measurable(given)
