"""A model in this process that answers as a server would, with the same policies and reports."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sluice.models.offline.engine import OfflineEngine, Request, offline_engine
from sluice.models.offline.evaluate.choices import encoded_choices, likeliest
from sluice.models.offline.evaluate.evaluation import EvaluationError, PolicyRefusedError, Reply
from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import PresetsFileError, all_presets, check_presets
from sluice.models.routing.schema import PresetFields
from sluice.models.telemetry.report import build_report


@dataclass(frozen=True)
class EngineBackend:
    """A model in this process; `engine_backend` starts one.

    Attributes:
        engine: runs the model.
        model: the same model's files.
        presets: that `routing` may name.
        at_once: most requests at a time.
        answered: called after every answer.
    """

    engine: OfflineEngine
    model: HFModel
    presets: Mapping[str, PresetFields]
    at_once: int
    answered: Callable[[], None]
    reports: bool = field(default=True, init=False)

    @property
    def template(self) -> bool:
        """Whether the model has a chat template."""
        return self.model.tokenizer.chat_template is not None

    def answers(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        """Greedy answers, in order; see `http_backend.HttpBackend.answers`."""
        prompts = [_encoded(self.model, example) for example in examples]
        replies = []
        for output, report in self._run(prompts, routing, max_tokens):
            answer = output.outputs[0]
            cut = answer.finish_reason == "length"
            seconds, tokens = _seconds(output), len(answer.token_ids)
            replies.append(Reply(answer.text, cut, (report,), seconds, tokens))
            self.answered()
        return replies

    def choices(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, per_token: bool
    ) -> list[Reply]:
        """The likeliest choices, in order; see `http_backend.HttpBackend.choices`."""
        lengths, prompts = [], []
        for example in examples:
            prompt = _encoded(self.model, example)
            choices = _choices(self.model, example, prompt)
            lengths += [len(prompt)] * len(choices)
            prompts += [(*prompt, *choice) for choice in choices]
        # One token, because vLLM generates no fewer.
        outputs = zip(lengths, self._run(prompts, routing, 1, prompt_logprobs=0), strict=True)
        replies = []
        for example in examples:
            assert example.choices is not None
            logprobs, reports = [], []
            seconds = 0.0
            for start, (output, report) in islice(outputs, len(example.choices)):
                ids, read = output.prompt_token_ids, output.prompt_logprobs
                logprobs.append([float(read[n][ids[n]].logprob) for n in range(start, len(ids))])
                reports.append(report)
                seconds += _seconds(output)
            chosen = example.choices[likeliest(logprobs, per_token)]
            replies.append(Reply(chosen, reports=tuple(reports), seconds=seconds))
            self.answered()
        return replies

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        routing: Mapping[str, Any] | None,
        max_tokens: int,
        **sampling: Any,
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Outputs of vLLM and reports; nothing of earlier calls is read from the prefix cache."""
        salt = uuid.uuid4().hex
        try:
            policy = self.engine.resolve(routing or {}, self.presets)
        except RoutingError as error:
            raise PolicyRefusedError(error.message, error.param) from None
        # What else the model's generation_config.json says applies, as it does on a server.
        sampling = {**self.engine.default_sampling, **sampling}
        for start in range(0, len(prompts), self.at_once):
            part = prompts[start : start + self.at_once]
            requests = [Request(prompt, policy, max_tokens) for prompt in part]
            outputs = self.engine.generate(requests, sampling, salt=salt)
            for request, output in zip(requests, outputs, strict=True):
                yield output, build_report(policy, self.engine.take_record(request))


@contextmanager
def engine_backend(
    model: str,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    presets: Path | None,
    profile: Path | None,
    at_once: int,
    kv_cache_memory_bytes: int | None,
    answered: Callable[[], None],
) -> Iterator[EngineBackend]:
    """Start an engine that has room for some examples, and end it.

    Args:
        model: a folder, or a name in the hub's cache.
        examples: what will be asked.
        max_tokens: of an answer.
        presets: file of presets, or None.
        profile: folder of the model's profile, or None.
        at_once: most requests at a time.
        kv_cache_memory_bytes: of the K/V cache; None is 1 GiB on a CPU and vLLM's choice elsewhere.
        answered: called after every answer.

    Raises:
        EvaluationError: the model, its presets or its profile cannot be used, or an example is
            longer than its context.
    """
    try:
        files = HFModel.of(model)
        loaded = None if profile is None else Profile.load(profile)
        if loaded is not None:
            loaded.check_model(files.layers, files.hidden, files.fingerprint)
        by_name = all_presets(presets, loaded)
    except (CalibrationError, ProfileError, PresetsFileError) as error:
        raise EvaluationError(str(error)) from None
    longest = max(_length(files, example, max_tokens) for example in examples)
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(
                offline_engine(
                    files.folder,
                    profile=profile,
                    enforce_eager=True,
                    disable_log_stats=False,  # Outputs have times then.
                    max_model_len=longest,
                    max_num_seqs=at_once,
                    kv_cache_memory_bytes=kv_cache_memory_bytes,
                )
            )
        except (ValueError, RuntimeError) as error:
            raise EvaluationError(f"{model}: the engine does not start: {error}") from error
        try:
            check_presets(by_name, engine.capabilities)
        except ProfileError as error:
            raise EvaluationError(str(error)) from None
        except RoutingError as error:
            message = f"presets file {presets}: {error.param}: {error.message}"
            raise EvaluationError(message) from None
        yield EngineBackend(engine, files, by_name, at_once, answered)


def _seconds(output: Any) -> float:
    """From when the engine took a request to its last token, by vLLM's own clock."""
    return float(output.metrics.last_token_ts - output.metrics.queued_ts)


def _encoded(model: HFModel, example: Example) -> tuple[int, ...]:
    try:
        return model.encode(example)
    except CalibrationError as error:
        raise EvaluationError(f"{example.where}: {error}") from None


def _choices(model: HFModel, example: Example, prompt: Sequence[int]) -> list[list[int]]:
    try:
        return encoded_choices(model, example, prompt)
    except CalibrationError as error:
        raise EvaluationError(str(error)) from None


def _length(model: HFModel, example: Example, max_tokens: int) -> int:
    """Tokens that an example takes at most.

    Raises:
        EvaluationError: more than the context.
    """
    prompt = _encoded(model, example)
    more = max_tokens
    if example.choices is not None:
        more = 1 + max(map(len, _choices(model, example, prompt)))
    if len(prompt) + more > model.context:
        raise EvaluationError(
            f"{example.where}: {len(prompt)} tokens, and the model's context of {model.context} "
            f"has no room for them and {more} more"
        )
    return len(prompt) + more
