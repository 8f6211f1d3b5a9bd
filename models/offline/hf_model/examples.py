"""Prompts and tasks from JSON lines files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr, ValidationError, model_validator

from sluice.models.profile.values import Strict


class CalibrationError(ValueError):
    """A calibration cannot be done; the message names the file and line, option or model."""


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Strict):
    """A line of a prompts or tasks file. One of `text`, `prompt` and `messages` is given.

    Attributes:
        text: read by the model as it is.
        prompt: what a user says, put into the model's chat template if it has one.
        messages: a conversation, put into the chat template.
        answer: the right answer; of tasks.
        choices: answers to choose from by log likelihood; `answer` is one of them.
        task: what it is counted under.
        label: of the behaviour that the prompt draws, for `behaviour`.
    """

    text: str | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None
    task: str = "all"
    label: str | None = None
    _where: str = PrivateAttr("")

    @property
    def where(self) -> str:
        """File and line that it was read from."""
        return self._where

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Messages of a `prompt` or of `messages`, as OpenAI has them."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]

    @model_validator(mode="after")
    def _consistent(self) -> Example:
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give one of text, prompt and messages ({found} given)")
        if not getattr(self, given[0]):
            raise ValueError(f"{given[0]} is empty")
        if self.answer == "":
            raise ValueError("answer is empty")
        if self.choices is not None:
            if len(self.choices) < 2 or len({*self.choices}) < len(self.choices):
                raise ValueError("choices must be two or more, and differ")
            if not all(self.choices):
                raise ValueError("a choice is empty")
            if self.answer not in self.choices:
                raise ValueError("answer is none of the choices")
        return self


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read a prompts file.

    Raises:
        CalibrationError: it cannot be read, holds nothing, or a line, which is named, is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8: {error}") from None
    examples = tuple(
        _example(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
    )
    if not examples:
        raise CalibrationError(f"{path}: no examples")
    return examples


def read_tasks(path: Path) -> tuple[Example, ...]:
    """Read a tasks file: every example has an answer.

    Raises:
        CalibrationError: as `read_examples`, or an answer is missing.
    """
    examples = read_examples(path)
    for example in examples:
        if example.answer is None:
            raise CalibrationError(f"{example.where}: answer: a task needs one")
    return examples


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of examples in their order."""
    wire = [example.model_dump(exclude_defaults=True) for example in examples]
    return hashlib.sha256(json.dumps(wire, sort_keys=True).encode()).hexdigest()


def _example(path: Path, number: int, line: str) -> Example:
    try:
        wire = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}:{number}: not JSON: {error}") from None
    where = f"{path}:{number}"
    try:
        example = Example.model_validate(wire)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        dotted = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise CalibrationError(f"{where}: {dotted + ': ' if dotted else ''}{message}") from None
    example._where = where
    return example


def spaced_indices(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places, ascending, each in the middle of its share; all if there are less.

    With `count` a half of `total` it is every other place, from the second on.
    """
    if count >= total:
        return tuple(range(total))
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))
