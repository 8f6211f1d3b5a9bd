"""One policy on tasks of both kinds: scores, work, and what the reader has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from support.stub_server import REPORT

from sluice.models.offline.evaluate.evaluation import EvaluationError, Reply, by_task, evaluate
from sluice.models.offline.evaluate.work import Work
from sluice.models.offline.hf_model.examples import Example

ASKED = [
    Example(prompt="1", answer="1", task="say"),
    Example(prompt="2", answer="y", choices=("x", "y"), task="choose"),
    Example(prompt="3", answer="?", task="say"),
    Example(prompt="4", answer="x", choices=("x", "y"), task="choose"),
    Example(prompt="5", answer="y", choices=("x", "y"), task="say"),
]
EXITS = {"depth": {"exit": {"method": "confidence", "layers": [1], "kv": "propagate"}}}


@dataclass
class Fake:
    """Answers with the prompt, and chooses `y`; every request has a report."""

    reports: bool = True
    template: bool = True
    cut: bool = False
    policy: Mapping[str, Any] = field(default_factory=dict)
    lost: bool = False
    sent: list[Any] = field(default_factory=list)

    def answers(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        self.sent.append((routing, max_tokens))
        replies = [Reply(each.prompt or "", self.cut, self._reports(1)) for each in examples]
        return [replace(reply, seconds=1.5, tokens=4) for reply in replies]

    def choices(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, per_token: bool
    ) -> list[Reply]:
        self.sent.append((routing, per_token))
        return [Reply("y", False, self._reports(2), seconds=0.5) for _ in examples]

    def _reports(self, count: int) -> tuple[Mapping[str, Any], ...]:
        report = {**REPORT, "policy": dict(self.policy)}
        if self.lost:
            report = {"policy": {}, "warnings": ["no record"]}
        return (report,) * count if self.reports else ()


def test_answers_are_compared_and_choices_chosen() -> None:
    fake = Fake()
    result = evaluate(fake, by_task(ASKED), "p", {"effort": 0.5, "report": False}, 7, True)
    say, choose = result.scores["say"], result.scores["choose"]
    assert (say.items, say.correct, choose.items, choose.correct) == (3, 2, 2, 1)
    assert say.misses == ((ASKED[2], "3"),)
    assert choose.misses == ((ASKED[3], "y"),)
    asked = {"effort": 0.5, "report": True}
    assert fake.sent == [(asked, 7), (asked, True)]
    assert result.work == Work(2 * 8, 1.5, 0.25, 0.5)
    assert result.warnings == ()
    assert result.times is not None
    # By task, as the items are.
    assert result.times.requests == (1.5, 1.5, 0.5, 0.5, 0.5)
    assert result.times.generated_tokens == 8
    assert result.times.answering > 0


def test_where_there_is_no_routing_none_is_sent() -> None:
    fake = Fake(reports=False)
    result = evaluate(fake, by_task(ASKED[:1]), "none", {}, 7)
    assert fake.sent == [(None, 7)]
    assert (result.work, result.warnings) == (None, ())
    with pytest.raises(EvaluationError, match="would be ignored"):
        evaluate(fake, by_task(ASKED[:1]), "p", {"effort": 0.5}, 7)


def test_choices_without_an_exit_say_so() -> None:
    fake = Fake(policy=EXITS)
    (warning,) = evaluate(fake, by_task(ASKED), "p", {"preset": "p"}).warnings
    assert warning.startswith("depth.exit acts on generated tokens only")
    assert "3 of 5 items" in warning
    assert evaluate(fake, by_task(ASKED[:1]), "p", {"preset": "p"}).warnings == ()


def test_answers_that_were_cut_off_say_so() -> None:
    (warning,) = evaluate(Fake(cut=True), by_task(ASKED), "none", {}, 7).warnings
    assert warning == "2 of 2 answers were cut off after 7 tokens"


def test_prompts_without_a_template_say_so() -> None:
    (warning,) = evaluate(Fake(template=False), by_task(ASKED), "none", {}).warnings
    assert "no chat template" in warning
    text = [Example(text="1", answer="1")]
    assert evaluate(Fake(template=False), by_task(text), "none", {}).warnings == ()


def test_lost_records_leave_the_work_unknown() -> None:
    result = evaluate(Fake(lost=True), by_task(ASKED), "none", {})
    assert result.work is None
    assert result.warnings == (
        "no record",
        "work is not known: a report counted nothing: no record",
    )
