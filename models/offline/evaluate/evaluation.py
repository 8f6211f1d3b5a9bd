"""Measures a policy: tasks to a backend, its replies to a result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sluice.models.offline.evaluate.choices import idle_controls
from sluice.models.offline.evaluate.results import PolicyResult, Times
from sluice.models.offline.evaluate.score import score
from sluice.models.offline.evaluate.work import NothingCountedError, Work
from sluice.models.offline.hf_model.examples import Example


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
        seconds: that the requests behind it took.
        tokens: that were generated for it.
    """

    text: str
    cut: bool = False
    reports: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    tokens: int = 0


MAX_TOKENS = 64
"""Most tokens of an answer, by default."""


class Backend(Protocol):
    """A model that answers: on a server (`http_backend`) or in this process (`engine_backend`)."""

    @property
    def reports(self) -> bool:
        """Whether it takes a `routing` object and reports what ran."""

    @property
    def template(self) -> bool:
        """Whether the model has a chat template; without one, prompts are read as they are."""

    def answers(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        """Greedy answers, in order."""

    def choices(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, per_token: bool
    ) -> list[Reply]:
        """The likeliest choice of each example, in order."""


def by_task(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples of each task, tasks in the order of their first example."""
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    return tasks


def evaluate(
    backend: Backend,
    tasks: Mapping[str, Sequence[Example]],
    policy: str,
    routing: Mapping[str, Any],
    max_tokens: int = MAX_TOKENS,
    per_token: bool = False,
) -> PolicyResult:
    """Measure quality and work of one policy.

    Args:
        backend: what answers.
        tasks: examples by task. Of one with choices the likeliest is chosen; others are answered.
        policy: its name in the result.
        routing: `routing` object of the policy; `report` is set here.
        max_tokens: of an answer.
        per_token: see `sluice.models.offline.evaluate.choices.likeliest`.

    Raises:
        PolicyRefusedError: the policy cannot be done.
        EvaluationError: the backend fails or refuses an example, or would ignore the policy.
    """
    controls = {key: value for key, value in routing.items() if key != "report"}
    if controls and not backend.reports:
        raise EvaluationError("no routing here: a policy would be ignored")
    sent = {**controls, "report": True} if backend.reports else None
    examples = [example for group in tasks.values() for example in group]
    open_ones = [index for index, example in enumerate(examples) if example.choices is None]
    with_choices = [index for index, example in enumerate(examples) if example.choices is not None]
    replies: dict[int, Reply] = {}
    answering = 0.0
    if open_ones:
        began = time.perf_counter()
        answers = backend.answers([examples[index] for index in open_ones], sent, max_tokens)
        answering = time.perf_counter() - began
        replies |= dict(zip(open_ones, answers, strict=True))
    if with_choices:
        chosen = backend.choices([examples[index] for index in with_choices], sent, per_token)
        replies |= dict(zip(with_choices, chosen, strict=True))
    texts = iter(replies[index].text for index in range(len(examples)))
    scores = score(tasks, {task: [next(texts) for _ in group] for task, group in tasks.items()})
    reports = [report for index in range(len(examples)) for report in replies[index].reports]
    warnings = [
        *_without_template(backend, examples),
        *_cut_off([replies[index] for index in open_ones], max_tokens),
        *_idle([replies[index] for index in with_choices], len(examples)),
        *dict.fromkeys(warning for report in reports for warning in report["warnings"]),
    ]
    work = None
    if backend.reports:
        requests = len(open_ones) + sum(len(examples[i].choices or ()) for i in with_choices)
        try:
            if len(reports) < requests:
                raise NothingCountedError(f"{requests - len(reports)} answers carry no report")
            work = Work.of_reports(reports)
        except NothingCountedError as error:
            warnings.append(f"work is not known: {error}")
    times = Times(
        tuple(replies[index].seconds for index in range(len(examples))),
        sum(reply.tokens for reply in replies.values()),
        answering,
    )
    return PolicyResult(policy, routing, scores, work, tuple(warnings), times)


def _without_template(backend: Backend, examples: Sequence[Example]) -> list[str]:
    """That prompts were not put into a chat template."""
    if backend.template or all(example.prompt is None for example in examples):
        return []
    return ["the model has no chat template: prompts are read as they are"]


def _cut_off(replies: Sequence[Reply], max_tokens: int) -> list[str]:
    """How many answers reached the most tokens."""
    count = sum(reply.cut for reply in replies)
    if not count:
        return []
    return [f"{count} of {len(replies)} answers were cut off after {max_tokens} tokens"]


def _idle(replies: Sequence[Reply], items: int) -> list[str]:
    """Controls that do nothing to choices."""
    effective = next((report["policy"] for reply in replies for report in reply.reports), None)
    idle = () if effective is None else idle_controls(effective)
    if not idle:
        return []
    acts = "acts" if len(idle) == 1 else "act"
    return [
        f"{', '.join(idle)} {acts} on generated tokens only, and choices are read as part of the "
        f"prompt: {len(replies)} of {items} items were measured without"
    ]
