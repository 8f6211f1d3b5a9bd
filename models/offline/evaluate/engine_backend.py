"""A model in this process, asked as a server would be: the same admission, the same reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sluice.models.engine.workers import worker_class
from sluice.models.offline.evaluate.choices import choice_tokens, likeliest
from sluice.models.offline.evaluate.evaluation import EvaluationError, PolicyRefusedError, Reply
from sluice.models.offline.hf_model.examples import CalibrationError, Example
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY
from sluice.models.profile.profile import PROFILE_ENV, Profile, ProfileError
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import PresetsFileError, all_presets, check_presets
from sluice.models.telemetry.report import build_report
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.server.access.capability import Caller, Capability
from sluice.server.admission import Admission, Admitted

_CPU_CACHE_BYTES = 1024**3
_NAME = "model"
_ROUTE = "/v1/completions"
_EVERYTHING = Caller(None, Capability.ADMIN)


@dataclass(frozen=True)
class InProcess:
    """A vLLM engine with our worker in this process.

    Attributes:
        llm: vLLM's `LLM`.
        subject: the same model's files.
        admission: turns `routing` into policies.
        at_once: most requests at a time.
        answered: called after every answer.
    """

    llm: Any
    subject: HFModel
    admission: Admission
    at_once: int
    answered: Callable[[], None]
    reports: bool = field(default=True, init=False)

    @property
    def template(self) -> bool:
        """Whether the model has a chat template."""
        return self.subject.tokenizer.chat_template is not None

    def answers(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        """Greedy answers, in order; see `http_backend.HttpBackend.answers`."""
        prompts = [_encoded(self.subject, example) for example in examples]
        replies = []
        for output, report in self._run(prompts, routing, max_tokens=max_tokens):
            answer = output.outputs[0]
            replies.append(Reply(answer.text, answer.finish_reason == "length", (report,)))
            self.answered()
        return replies

    def choices(
        self, examples: Sequence[Example], routing: Mapping[str, Any] | None, per_token: bool
    ) -> list[Reply]:
        """The likeliest choices, in order; see `http_backend.HttpBackend.choices`."""
        starts, asked = [], []
        for example in examples:
            prompt = _encoded(self.subject, example)
            behind = _choices(self.subject, example, prompt)
            starts += [len(prompt)] * len(behind)
            asked += [(*prompt, *own) for own in behind]
        # vLLM generates a token at least.
        outputs = zip(
            starts, self._run(asked, routing, max_tokens=1, prompt_logprobs=0), strict=True
        )
        replies = []
        for example in examples:
            assert example.choices is not None
            found, reports = [], []
            for start, (output, report) in islice(outputs, len(example.choices)):
                ids, read = output.prompt_token_ids, output.prompt_logprobs
                found.append([float(read[n][ids[n]].logprob) for n in range(start, len(ids))])
                reports.append(report)
            chosen = example.choices[likeliest(found, per_token)]
            replies.append(Reply(chosen, reports=tuple(reports)))
            self.answered()
        return replies

    def _run(
        self, prompts: Sequence[Sequence[int]], routing: Mapping[str, Any] | None, **sampling: Any
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Outputs of vLLM and reports."""
        for start in range(0, len(prompts), self.at_once):
            part = prompts[start : start + self.at_once]
            admitted = [self._admitted(routing or {}) for _ in part]
            outputs = self.llm.generate(
                [_request(ids, own) for ids, own in zip(part, admitted, strict=True)],
                [self._sampling(own, sampling) for own in admitted],
                use_tqdm=False,
            )
            for output, own in zip(outputs, admitted, strict=True):
                records = self.llm.collective_rpc(
                    "take_routing_record", args=(own.extra.request_key,)
                )
                record = records[0] and RoutingRecord.from_wire(records[0])
                yield output, build_report(own.extra.policy, record)

    def _admitted(self, routing: Mapping[str, Any]) -> Admitted:
        body = {"model": _NAME, "routing": dict(routing)}
        try:
            admitted = self.admission.admit(_ROUTE, body, _EVERYTHING)
        except RoutingError as error:
            raise PolicyRefusedError(error.message, error.param) from None
        assert admitted is not None
        return admitted

    def _sampling(self, admitted: Admitted, more: Mapping[str, Any]) -> Any:
        # What else the model's generation_config.json says holds, as it does on a server.
        params = self.llm.get_default_sampling_params()
        params.temperature = 0.0
        params.extra_args = {EXTRA_ARGS_KEY: admitted.extra.encode()}
        for name, value in more.items():
            setattr(params, name, value)
        return params


@contextmanager
def in_process(
    model: str,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    presets: Path | None,
    profile: Path | None,
    at_once: int,
    kv_cache_memory_bytes: int | None,
    answered: Callable[[], None],
) -> Iterator[InProcess]:
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
        subject = HFModel.of(model)
        held = None if profile is None else Profile.load(profile)
        if held is not None:
            held.check_model(subject.layers, subject.hidden, subject.fingerprint)
        own = all_presets(presets, held)
    except (CalibrationError, ProfileError, PresetsFileError) as error:
        raise EvaluationError(str(error)) from None
    longest = max(_length(subject, example, max_tokens) for example in examples)
    # vLLM reads the environment on import.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop(PROFILE_ENV, None)
    if profile is not None:
        os.environ[PROFILE_ENV] = str(profile.resolve())
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    if kv_cache_memory_bytes is None and current_platform.is_cpu():
        kv_cache_memory_bytes = _CPU_CACHE_BYTES
    with ExitStack() as stack:
        # After an engine that did not start as well: the next one would take its process groups.
        stack.callback(cleanup_dist_env_and_memory)
        try:
            llm = LLM(
                str(subject.folder),
                worker_cls=worker_class(),
                enforce_eager=True,
                max_model_len=longest,
                max_num_seqs=at_once,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                seed=0,
            )
        except (ValueError, RuntimeError) as error:
            raise EvaluationError(f"{model}: the engine does not start: {error}") from error
        stack.callback(llm.llm_engine.engine_core.shutdown)
        try:
            answer = llm.collective_rpc("describe_experts")[0]
            able = Capabilities.of(
                llm.llm_engine.vllm_config, (_NAME,), held, answer, expert_routing=True
            )
            admission = Admission(able, own)
            check_presets(own, able)
        except ProfileError as error:
            raise EvaluationError(str(error)) from None
        except RoutingError as error:
            message = f"presets file {presets}: {error.param}: {error.message}"
            raise EvaluationError(message) from None
        yield InProcess(llm, subject, admission, at_once, answered)


def _encoded(subject: HFModel, example: Example) -> tuple[int, ...]:
    try:
        return subject.encode(example)
    except CalibrationError as error:
        raise EvaluationError(f"{example.where}: {error}") from None


def _choices(subject: HFModel, example: Example, prompt: Sequence[int]) -> list[list[int]]:
    """Token ids of each choice of an example."""
    tokenizer = subject.tokenizer
    text = example.text
    if text is None and example.messages is None and tokenizer.chat_template is None:
        text = example.prompt
    found = []
    for choice in example.choices or ():
        own = list(tokenizer(choice, add_special_tokens=False)["input_ids"])
        if text is not None:
            own = choice_tokens(prompt, tokenizer(text + choice)["input_ids"], own)
        if not own:
            raise EvaluationError(f"{example.where}: choice {choice!r} has no tokens")
        found.append(own)
    return found


def _length(subject: HFModel, example: Example, max_tokens: int) -> int:
    """Tokens that an example takes at most.

    Raises:
        EvaluationError: more than the context.
    """
    prompt = _encoded(subject, example)
    more = max_tokens
    if example.choices is not None:
        more = 1 + max(map(len, _choices(subject, example, prompt)))
    if len(prompt) + more > subject.context:
        raise EvaluationError(
            f"{example.where}: {len(prompt)} tokens, and the model's context of {subject.context} "
            f"has no room for them and {more} more"
        )
    return len(prompt) + more


def _request(ids: Sequence[int], admitted: Admitted) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": list(ids)}
    salt = admitted.body.get("cache_salt")
    return request if salt is None else {**request, "cache_salt": salt}
