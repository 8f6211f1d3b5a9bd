"""What a backend answers to a task, and what can be wrong about asking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class EvaluationError(Exception):
    """Something cannot be evaluated; the message names the server, model, option or line."""


class PolicyRefusedError(EvaluationError):
    """A policy cannot be done.

    Attributes:
        message: what is wrong.
        param: dotted path of the field.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(f"{param}: {message}")
        self.message = message
        self.param = param


@dataclass(frozen=True)
class Reply:
    """Answer to one example.

    Attributes:
        text: what was generated, or the likeliest choice.
        cut: it ended because it was as long as it may be.
        reports: `routing` objects of the answers behind it, if they carried any.
    """

    text: str
    cut: bool = False
    reports: tuple[Mapping[str, Any], ...] = ()
