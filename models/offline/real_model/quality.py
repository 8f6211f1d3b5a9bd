"""What policies cost a model in quality, beside full depth on the same questions.

``python -m sluice.models.offline.real_model.quality MODEL --questions FOLDER --policies FILE
--out FILE``. Three measures, as different policies can be seen in different ones:

* *choices*: held-out questions whose answer is chosen by log likelihood, read as part of the
  prompt. Early exits act on generated tokens only and change nothing here, so they have no value.
* *answers*: held-out questions answered in a few words, right if the first line is the answer.
* *agreement*: the share of full depth's own tokens that a policy would have chosen too, each after
  full depth's tokens before it. A policy that acts on prompts reads full depth's answer as a part
  of the prompt. Of any other, each token but the first is generated after the prompt, all of full
  depth's tokens but the last one, and that one generated again.

Two runs of full depth differ too, where two tokens are nearly as likely: its own row is the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sluice.models.offline.engine import OfflineEngine, Request
from sluice.models.offline.evaluate.choices import idle_controls
from sluice.models.offline.evaluate.engine_backend import EngineBackend, engine_backend
from sluice.models.offline.evaluate.evaluation import EvaluationError
from sluice.models.offline.evaluate.work import Work
from sluice.models.offline.hf_model.examples import Example, read_examples, read_tasks
from sluice.models.offline.intervals import Paired, paired_difference, share_interval, token_share
from sluice.models.offline.provenance import provenance
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.values import Interval
from sluice.models.routing.errors import RoutingError

FULL_DEPTH = "full depth"
ANSWER_TOKENS = 12
CHAT_TOKENS = 32
_AT_ONCE = 32
_SALT = "quality"


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        choices: with answers to choose from.
        answers: to be answered.
        chats: that full depth's own answers are taken of.
    """

    choices: tuple[Example, ...]
    answers: tuple[Example, ...]
    chats: tuple[Example, ...]

    @classmethod
    def of(cls, folder: Path) -> Questions:
        """Read the files that `sluice.models.offline.real_model.questions` writes.

        Raises:
            CalibrationError: a file cannot be read, or a line is wrong.
        """
        return cls(
            read_tasks(folder / "choices.jsonl"),
            read_tasks(folder / "answers.jsonl"),
            read_examples(folder / "chats.jsonl"),
        )


@dataclass(frozen=True)
class Measured:
    """One policy.

    Attributes:
        routing: the object that asks for it.
        choices: right ones, item by item, or None if the policy does nothing to choices.
        answers: right ones, item by item.
        agreed: of each chat, tokens that agree with full depth's.
        compared: of each chat, tokens that were compared.
        work: of the chats, generated freely.
    """

    routing: Mapping[str, Any]
    choices: tuple[bool, ...] | None
    answers: tuple[bool, ...]
    agreed: tuple[int, ...]
    compared: tuple[int, ...]
    work: Work

    def to_wire(self, full: Measured) -> dict[str, Any]:
        """As JSON values.

        Args:
            full: full depth, which differences are from.
        """
        return {
            "routing": dict(self.routing),
            "choices": None if self.choices is None else paired(self.choices, full.choices or ()),
            "answers": paired(self.answers, full.answers),
            "agreement": _wire(token_share(self.agreed, self.compared)),
            "compute_fraction": self.work.generated_compute_fraction,
            "mean_layers": self.work.mean_layers,
        }


def paired(right: Sequence[bool], full: Sequence[bool]) -> dict[str, Any]:
    """A share of right answers, and its difference from full depth's on the same items.

    Args:
        right: item by item.
        full: full depth's, of the same items.

    Returns:
        `value`, `low`, `high` (Wilson's interval), `items`, and `difference` with the same three
        (see `paired_difference`).
    """
    share = share_interval(sum(right) / len(right), len(right))
    difference = paired_difference([Paired.of(right, full)])
    return {**_wire(share), "items": len(right), "difference": _wire(difference)}


def _wire(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


class QualityMeasure:
    """Measures one policy after the other in one engine."""

    def __init__(self, backend: EngineBackend, questions: Questions) -> None:
        """Answer the chats at full depth.

        Args:
            backend: with room for the questions and their answers.
            questions: what is asked.
        """
        self._backend, self._questions = backend, questions
        self._chats = [backend.model.encode(example) for example in questions.chats]
        outputs = self._generated(self._chats, None, CHAT_TOKENS)
        self._reference = [tuple(output.outputs[0].token_ids) for output in outputs]

    def measure(self, routing: Mapping[str, Any]) -> Measured:
        """Measure a policy.

        Raises:
            RoutingError: it cannot be done.
        """
        policy = self._engine.resolve(routing, self._backend.presets)
        idle = bool(idle_controls(policy.to_dict()))
        agreed, compared = self._generated_agreement(policy) if idle else self._read(policy)
        return Measured(
            routing,
            None if idle else self._choices(routing),
            self._answers(policy),
            agreed,
            compared,
            self._work(policy),
        )

    def noise(self) -> dict[str, Interval]:
        """Agreement of full depth with itself, by both ways to see it."""
        ways = {"read": self._read, "generated": self._generated_agreement}
        return {name: token_share(*way(RoutingPolicy())) for name, way in ways.items()}

    @property
    def _engine(self) -> OfflineEngine:
        return self._backend.engine

    def _choices(self, routing: Mapping[str, Any]) -> tuple[bool, ...]:
        examples = self._questions.choices
        replies = self._backend.choices(examples, routing, per_token=False)
        return tuple(
            reply.text == example.answer for example, reply in zip(examples, replies, strict=True)
        )

    def _answers(self, policy: RoutingPolicy) -> tuple[bool, ...]:
        examples = self._questions.answers
        prompts = [self._backend.model.encode(example) for example in examples]
        outputs = self._generated(prompts, policy, ANSWER_TOKENS, stop=["\n"])
        return tuple(
            output.outputs[0].text.strip().lower() == (example.answer or "").lower()
            for example, output in zip(examples, outputs, strict=True)
        )

    def _read(self, policy: RoutingPolicy) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Agreement of a policy that acts on prompts: tokens of the prompt that are likeliest."""
        prompts = [(*p, *answer) for p, answer in zip(self._chats, self._reference, strict=True)]
        outputs = self._generated(prompts, policy, 1, prompt_logprobs=0)
        agreed = []
        for prompt, output in zip(self._chats, outputs, strict=True):
            ids, read = output.prompt_token_ids, output.prompt_logprobs
            ranks = [read[place][ids[place]].rank for place in range(len(prompt) + 1, len(ids))]
            agreed.append(sum(rank == 1 for rank in ranks))
        return tuple(agreed), tuple(len(answer) - 1 for answer in self._reference)

    def _generated_agreement(
        self, policy: RoutingPolicy
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Agreement of a policy that acts on generated tokens: of each second token generated.

        The first one comes from the prompt. Where it is not full depth's, nothing is compared.
        """
        places = [
            (n, t) for n, answer in enumerate(self._reference) for t in range(len(answer) - 1)
        ]
        prompts = [(*self._chats[n], *self._reference[n][:t]) for n, t in places]
        agreed, compared = [0] * len(self._chats), [0] * len(self._chats)
        outputs = self._generated(prompts, policy, 2, ignore_eos=True)
        for (n, t), output in zip(places, outputs, strict=True):
            first, second = output.outputs[0].token_ids
            if first == self._reference[n][t]:
                compared[n] += 1
                agreed[n] += second == self._reference[n][t + 1]
        return tuple(agreed), tuple(compared)

    def _work(self, policy: RoutingPolicy) -> Work:
        requests = [Request(prompt, policy, CHAT_TOKENS) for prompt in self._chats]
        records = []
        for start in range(0, len(requests), _AT_ONCE):
            part = requests[start : start + _AT_ONCE]
            self._engine.generate(part, {"ignore_eos": True}, salt=_SALT)
            records += [self._engine.take_record(request) for request in part]
        return Work.of_records(record for record in records if record is not None)

    def _generated(
        self,
        prompts: Sequence[Sequence[int]],
        policy: RoutingPolicy | None,
        max_tokens: int,
        **sampling: Any,
    ) -> list[Any]:
        """VLLM's outputs, in order."""
        outputs = []
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            requests = [Request(prompt, policy, max_tokens) for prompt in part]
            outputs += self._engine.generate(requests, sampling, salt=_SALT)
            if policy is not None:
                for request in requests:
                    self._engine.take_record(request)
        return outputs


def measure_all(
    model: str, questions: Questions, policies: Mapping[str, Any], profile: Path | None
) -> dict[str, Any]:
    """Measure full depth and policies.

    Args:
        model: a folder.
        questions: what is asked.
        policies: `routing` objects by name.
        profile: the model's, or None.

    Returns:
        JSON values: `provenance`; `tasks` with the number of items of each; `noise`, full depth's
        agreement with itself; `policies` by name.

    Raises:
        EvaluationError: the model or its profile cannot be used.
        RoutingError: a policy cannot be done.
    """
    # Chats are read with their answers, and two tokens are generated after that.
    longest = max(ANSWER_TOKENS, CHAT_TOKENS) + 2
    examples = (*questions.choices, *questions.answers, *questions.chats)
    with engine_backend(
        model,
        examples,
        max_tokens=longest,
        presets=None,
        profile=profile,
        at_once=_AT_ONCE,
        kv_cache_memory_bytes=None,
        answered=lambda: None,
    ) as backend:
        measure = QualityMeasure(backend, questions)
        noise = measure.noise()
        measured: dict[str, Measured] = {}
        by_digest: dict[str, Measured] = {}
        for name, routing in {FULL_DEPTH: {}, **policies}.items():
            digest = backend.engine.resolve(routing, backend.presets).digest
            if digest not in by_digest:
                by_digest[digest] = measure.measure(routing)
                print(f"measured: {name}", file=sys.stderr, flush=True)
            measured[name] = replace(by_digest[digest], routing=routing)
    full = measured[FULL_DEPTH]
    counted: dict[str, int] = {}
    for example in examples:
        counted[example.task] = counted.get(example.task, 0) + 1
    return {
        **provenance(),
        "tasks": counted,
        "noise": {name: _wire(each) for name, each in noise.items()},
        "policies": {name: each.to_wire(full) for name, each in measured.items()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.real_model.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="model folder")
    parser.add_argument("--questions", type=Path, required=True, help="folder of the questions")
    parser.add_argument("--policies", type=Path, required=True, help="JSON: objects by name")
    parser.add_argument("--profile", type=Path, help="the model's profile")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    policies = json.loads(args.policies.read_text(encoding="utf-8"))
    try:
        found = measure_all(args.model, Questions.of(args.questions), policies, args.profile)
    except (EvaluationError, RoutingError, ValueError) as error:
        parser.error(str(error))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
