"""What settings are measured on: prompts that full depth answers, and tasks with right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.evaluate.choices import encoded_choices, likeliest
from sluice.models.offline.hf_model.examples import CalibrationError, Example, spaced_indices

Measure = Literal["exact match", "choices", "exact match and choices", "token agreement"]


@dataclass(frozen=True)
class Task:
    """What has a right answer.

    Attributes:
        prompt: token ids.
        answer: the right one, as text.
        choices: as texts; none of a task that is answered freely.
        choice_tokens: token ids of each choice.
    """

    prompt: tuple[int, ...]
    answer: str
    choices: tuple[str, ...] = ()
    choice_tokens: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, calibration: Calibration, example: Example) -> Task:
        """Encode an example with an answer.

        Raises:
            CalibrationError: it leaves no room in the model's context, or a choice has no tokens.
        """
        (prompt,) = calibration.encoded([example])
        answer = example.answer or ""
        if example.choices is None:
            return cls(prompt, answer)
        tokens = encoded_choices(calibration.model, example, prompt)
        longest = len(prompt) + max(map(len, tokens))
        if longest > calibration.model.context:
            raise CalibrationError(
                f"{example.where}: {longest} tokens with its longest choice, and the model's "
                f"context is {calibration.model.context}"
            )
        return cls(prompt, answer, example.choices, tuple(map(tuple, tokens)))

    def right(self, log_probs: Sequence[Sequence[float]]) -> tuple[bool, bool]:
        """Whether the likeliest choice is right: plain, and per character (lm-eval's `acc_norm`).

        Args:
            log_probs: of the tokens of each choice.
        """
        plain = likeliest(log_probs, per_token=False)
        sums = zip(log_probs, self.choices, strict=True)
        normalised = likeliest([[sum(each) / len(text)] for each, text in sums], per_token=False)
        return self.choices[plain] == self.answer, self.choices[normalised] == self.answer


@dataclass(frozen=True)
class Items:
    """What is asked.

    Attributes:
        prompts: token ids of the texts that full depth answers, whose tokens are compared.
        tasks: what quality is measured on; without any it is the agreement of tokens.
        ends: tokens that end an answer.
        new_tokens: most tokens of an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    tasks: tuple[Task, ...]
    ends: frozenset[int]
    new_tokens: int

    @classmethod
    def of(cls, calibration: Calibration, tasks: int, prompts: int) -> Items:
        """Tasks and prompts; of more than so many, as many evenly spread.

        Args:
            calibration: whose examples they are.
            tasks: at most.
            prompts: at most.

        Raises:
            CalibrationError: a prompt leaves no room for an answer, or a choice has no tokens.
        """
        asked = [calibration.tasks[n] for n in spaced_indices(tasks, len(calibration.tasks))]
        chosen = [calibration.prompts[n] for n in spaced_indices(prompts, len(calibration.prompts))]
        return cls(
            tuple(calibration.encoded(chosen)),
            tuple(Task.of(calibration, example) for example in asked),
            calibration.model.ends,
            calibration.new_tokens,
        )

    @property
    def measure(self) -> Measure:
        """What quality is."""
        kinds = {bool(task.choices) for task in self.tasks}
        if not kinds:
            return "token agreement"
        if len(kinds) > 1:
            return "exact match and choices"
        return "choices" if kinds == {True} else "exact match"

    @property
    def count(self) -> int:
        """How many items quality is measured on."""
        return len(self.tasks) or len(self.prompts)

    @property
    def requests(self) -> int:
        """Most requests that are asked at a time, without a limit."""
        choices = sum(len(task.choices) for task in self.tasks)
        free = sum(not task.choices for task in self.tasks)
        return max(len(self.prompts), choices, free)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        free = [len(task.prompt) for task in self.tasks if not task.choices]
        lengths = [length + self.new_tokens for length in (*map(len, self.prompts), *free)]
        for task in self.tasks:
            lengths += [len(task.prompt) + len(tokens) for tokens in task.choice_tokens]
        return max(lengths)
