"""Whether full depth can be measured with what was given: asked before any step is begun.

A step that finds after half an hour that no task can be answered has found it too late. So a few
prompts and tasks are tried first, until one shows that something could be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from sluice.models.offline.calibrate.items import Task
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import key_of
from sluice.models.offline.hf_model.examples import CalibrationError, digest, spaced_indices
from sluice.models.offline.hf_model.hooks import continued
from sluice.models.offline.hf_model.samples import Sample

_KEPT = "measurable"
_TRIED = 64
"""Prompts, and tasks, that are tried at most. If full depth has none of so many right, it has
hardly one in twenty right, and no loss of quality could be seen."""
_AT_ONCE = 8

T = TypeVar("T")


def check_measurable(calibration: Calibration) -> None:
    """Check that an answer has a second token, and that full depth has a task right.

    Raises:
        CalibrationError: not so, or a prompt or task does not fit the model.
    """
    given = [digest(calibration.prompts), digest(calibration.tasks)]
    key = key_of(calibration.model.fingerprint, calibration.new_tokens, *given)
    if calibration.workspace.value(_KEPT, key):
        return
    tasks = [Task.of(calibration, example) for example in calibration.tasks]
    if tasks and not any(_generates(task) for task in tasks):
        raise CalibrationError(
            "no choice of the tasks has a second token, and the first one comes from the prompt: "
            "nothing that acts on generated tokens would change an answer"
        )
    prompts = [*calibration.encoded(calibration.prompts)]
    if not _one(prompts, lambda part: any(len(a) > 1 for a in _answers(calibration, part))):
        raise CalibrationError("no answer has a second token: no step generates anything")
    if tasks and not _one(tasks, lambda part: any(_right(calibration, part))):
        tried = min(len(tasks), _TRIED)
        raise CalibrationError(
            f"full depth has none of the tasks right, of {tried} that were tried: what could be "
            "lost?"
        )
    calibration.workspace.keep(_KEPT, key, True)


def _generates(task: Task) -> bool:
    """Whether a step gives a token of the answers that the task tells apart."""
    return not task.choices or any(len(tokens) > 1 for tokens in task.choice_tokens)


def _one(things: Sequence[T], holds: Callable[[Sequence[T]], bool]) -> bool:
    """Whether something holds of a part of the things, which are tried a few at a time."""
    chosen = [things[place] for place in spaced_indices(_TRIED, len(things))]
    return any(holds(chosen[start : start + _AT_ONCE]) for start in range(0, len(chosen), _AT_ONCE))


def _answers(
    calibration: Calibration, prompts: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    for _, samples in continued(calibration.model, prompts, calibration.new_tokens):
        yield from (sample.answer for sample in samples)


def _right(calibration: Calibration, tasks: Sequence[Task]) -> Iterator[bool]:
    """Whether full depth has each task right."""
    model = calibration.model
    for task in tasks:
        if task.choices:
            samples = [Sample(task.prompt, tokens) for tokens in task.choice_tokens]
            yield task.right([_log_probs(calibration, sample) for sample in samples])[0]
        else:
            (answer,) = _answers(calibration, [task.prompt])
            yield model.decode(answer).strip() == task.answer.strip()


@torch.inference_mode()
def _log_probs(calibration: Calibration, sample: Sample) -> list[float]:
    ((_, batch),) = calibration.model.batches([sample])
    log_probs = batch.answer_logits(calibration.model.causal_lm).float().log_softmax(-1)
    found: list[float] = log_probs.gather(-1, batch.targets[:, None])[:, 0].tolist()
    return found
