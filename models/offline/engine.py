"""vLLM's engine in the commands that run offline: calibrate, eval and bench.

It runs policies as a server would, and hands back outputs, times and the worker's records.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sluice.models.depth.prefix_sharing import cache_salt
from sluice.models.engine.workers import CPU_KV_CACHE_BYTES, worker_class
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.frontier_fields import EngineMode
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.presets import request_policy
from sluice.models.routing.resolve import merge_preset
from sluice.models.routing.schema import PresetFields, parse_routing
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.records import Records
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.vllm_adapter.engine_mode import engine_mode
from sluice.models.vllm_adapter.patches.api_telemetry import inbox_of

_MODEL_NAME = "model"


@dataclass(frozen=True)
class Request:
    """A request to an engine.

    Attributes:
        prompt: token ids.
        policy: what it runs under; None sends no routing at all.
        max_tokens: of its answer.
        key: names the request, and its record.
    """

    prompt: Sequence[int]
    policy: RoutingPolicy | None
    max_tokens: int
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def extra(self) -> RoutingExtraArgs | None:
        """What the worker gets of it beside the prompt."""
        return None if self.policy is None else RoutingExtraArgs(self.policy, self.key)


@dataclass(frozen=True)
class Outcome:
    """Answers to a list of prompts.

    Attributes:
        tokens: of each prompt's answer, the end token included.
        decoded: tokens generated in steps before which every request of the batch had its first.
        seconds: that these steps took.
        records: of the requests, in order; none of requests without a policy.
    """

    tokens: tuple[tuple[int, ...], ...]
    decoded: int
    seconds: float
    records: tuple[RoutingRecord, ...]


class OfflineEngine:
    """A running engine; `offline_engine` starts one.

    Attributes:
        profile: the one it was started with, or None.
    """

    def __init__(self, llm: Any, profile: Profile | None) -> None:
        self._llm: Any = llm
        self.profile = profile

    @property
    def vllm_config(self) -> Any:
        """VLLM's configuration of the engine."""
        return self._llm.llm_engine.vllm_config

    @property
    def mode(self) -> EngineMode:
        """How it runs the model."""
        return engine_mode(self.vllm_config)

    @property
    def model_runner(self) -> Any:
        """The model runner of an engine in this process."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def default_sampling(self) -> dict[str, Any]:
        """Sampling parameters of the model's `generation_config.json`."""
        return dict(self.vllm_config.model_config.get_diff_sampling_param())

    @cached_property
    def expert_answer(self) -> Mapping[str, Any]:
        """The worker's answer to `describe_experts`."""
        answer: Mapping[str, Any] = self._llm.collective_rpc("describe_experts")[0]
        return answer

    @cached_property
    def capabilities(self) -> Capabilities:
        """What policies are checked against; requests may control experts.

        Raises:
            ProfileError: the profile was made for another model.
            FingerprintError: the model's files cannot be read.
        """
        return Capabilities.of(
            self.vllm_config, (_MODEL_NAME,), self.profile, self.expert_answer, expert_routing=True
        )

    def resolve(
        self, routing: Mapping[str, Any], presets: Mapping[str, PresetFields] | None = None
    ) -> RoutingPolicy:
        """The policy of a `routing` object, as a server would make it.

        Raises:
            RoutingError: a server would refuse it with the same error.
        """
        presets = presets or {}
        fields = merge_preset(parse_routing(routing), presets, "routing.preset")
        return request_policy(fields, presets, self.capabilities)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Mapping[str, Any],
        *,
        salt: str | None = None,
    ) -> list[Any]:
        """Answer greedily, all requests at once.

        Args:
            requests: what to run.
            sampling: more of vLLM's sampling parameters.
            salt: keep the K/V of different policies apart in the prefix cache, and of requests
                with other salts, as a server does with a client's `cache_salt`; None does not.

        Returns:
            vLLM's outputs, in order.
        """
        prompts: list[dict[str, Any]] = []
        for request in requests:
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt)}
            if salt is not None:
                own = None if request.extra is None else cache_salt(request.extra, salt)
                prompt["cache_salt"] = own or salt
            prompts.append(prompt)
        params = [_sampling_params(request, sampling) for request in requests]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        policy: RoutingPolicy | None,
        max_tokens: Sequence[int],
        ends: Collection[int],
        batch: int,
    ) -> Outcome:
        """Answer greedily in batches, and time their decode steps.

        Args:
            prompts: token ids.
            policy: of all of them; None sends no routing at all.
            max_tokens: of each prompt's answer.
            ends: tokens that end an answer, whatever the model's files say.
            batch: requests at a time; the next ones wait until all of a batch have ended.

        Raises:
            RuntimeError: the engine lost a record.
        """
        requests = [
            Request(prompt, policy, limit)
            for prompt, limit in zip(prompts, max_tokens, strict=True)
        ]
        return self.run(requests, ends, batch)

    def run(self, requests: Sequence[Request], ends: Collection[int], batch: int) -> Outcome:
        """As `answers`, of requests.

        Raises:
            RuntimeError: the engine lost a record.
        """
        tokens: list[tuple[int, ...]] = []
        records: list[RoutingRecord] = []
        decoded, seconds = 0, 0.0
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            answers, batch_decoded, batch_seconds = self._run_batch(part, ends)
            tokens += [tuple(answers[request.key]) for request in part]
            decoded += batch_decoded
            seconds += batch_seconds
            for request in part:
                if request.policy is None:
                    continue
                record = self.take_record(request)
                if record is None:
                    raise RuntimeError(f"the engine kept no record of request {request.key}")
                records.append(record)
        return Outcome(tuple(tokens), decoded, seconds, tuple(records))

    def take_record(self, request: Request) -> RoutingRecord | None:
        """What a request ran, once; None if the engine has no record of it."""
        engine, records = self._llm.llm_engine, self._records
        while not records.inbox.complete(request.key):
            engine.step()  # A stop string ends an answer before the engine's scheduler knows.
        return records.take_now(request.key)

    @cached_property
    def _records(self) -> Records:
        cost = self._llm.collective_rpc("describe_cost")[0]
        shape = self.expert_answer["shape"]
        return Records(
            inbox_of(self._llm.llm_engine.output_processor),
            None if cost is None else ModuleCost.from_wire(cost),
            None if shape is None else ExpertShape.from_dict(shape),
        )

    def close(self) -> None:
        """End the engine and let its memory go."""
        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()

    def _run_batch(
        self, requests: Sequence[Request], ends: Collection[int]
    ) -> tuple[dict[str, list[int]], int, float]:
        """Step until all have ended.

        Returns:
            Tokens by request key, and how many tokens were decoded in what time, seconds.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        sampling = {
            "ignore_eos": True,
            "stop_token_ids": sorted(ends),
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
        for request in requests:
            prompt = {"prompt_token_ids": list(request.prompt)}
            engine.add_request(request.key, prompt, _sampling_params(request, sampling))
        answers: dict[str, list[int]] = {request.key: [] for request in requests}
        decoded, seconds = 0, 0.0
        while engine.has_unfinished_requests():
            decoding = all(answers.values())
            before = sum(map(len, answers.values()))
            began = time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - began
            for output in outputs:
                answers[output.request_id] += output.outputs[0].token_ids
            if decoding:
                decoded += sum(map(len, answers.values())) - before
                seconds += took
        return answers, decoded, seconds


@contextmanager
def offline_engine(
    model: Path,
    *,
    profile: Path | None = None,
    worker: str | None = None,
    in_process: bool = True,
    kv_cache_memory_bytes: int | None = None,
    **arguments: Any,
) -> Iterator[OfflineEngine]:
    """Start an engine, and end it.

    Afterwards this process is as it was: environment, random states, threads.

    Args:
        model: its folder.
        profile: folder of the model's profile, or None.
        worker: for vLLM's `worker_cls`; None is our worker for this machine.
        in_process: run the engine in this process, and not in others as a server does.
        kv_cache_memory_bytes: of the K/V cache; None is 1 GiB on a CPU and vLLM's choice elsewhere.
        arguments: more of vLLM's engine arguments.

    Raises:
        ProfileError: the profile cannot be read.
        ValueError: vLLM cannot run the model with these arguments.
        RuntimeError: the engine does not start.
    """
    with _process_restored(), ExitStack() as stack:
        _set_environment(profile, in_process)
        # vLLM reads the environment on import.
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        if kv_cache_memory_bytes is None and current_platform.is_cpu():
            kv_cache_memory_bytes = CPU_KV_CACHE_BYTES
        # Also after a failed start: the next engine would take over its process groups.
        stack.callback(cleanup_dist_env_and_memory)
        llm = LLM(
            str(model),
            worker_cls=worker or worker_class(),
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            seed=0,
            **_attention_backend(model, arguments.get("dtype", "auto")),
            **arguments,
        )
        engine = OfflineEngine(llm, None if profile is None else Profile.load(profile))
        del llm
        stack.callback(engine.close)
        yield engine


def _sampling_params(request: Request, sampling: Mapping[str, Any]) -> Any:
    from vllm import SamplingParams

    extra_args = request.extra and {EXTRA_ARGS_KEY: request.extra.encode()}
    greedy = {"temperature": 0.0, "max_tokens": request.max_tokens, "extra_args": extra_args}
    return SamplingParams(**{**sampling, **greedy})


def _attention_backend(model: Path, dtype: str) -> dict[str, str]:
    """The attention backend to choose where vLLM's own choice would not start.

    On a CPU with AMX vLLM takes `AMX_MLA` for multi-head latent attention. That backend runs
    bfloat16 only.
    """
    from vllm.platforms import current_platform

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        # What vLLM makes of a model in float32 that nobody gave a type.
        dtype = "bfloat16" if dtype == "float32" else dtype
    latent = config.get("kv_lora_rank") is not None
    if latent and dtype != "bfloat16" and current_platform.is_cpu():
        return {"attention_backend": "CPU_MLA"}
    return {}


def _set_environment(profile: Path | None, in_process: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop(PROFILE_ENV, None)
    if profile is not None:
        os.environ[PROFILE_ENV] = str(profile.resolve())


@contextmanager
def _process_restored() -> Iterator[None]:
    """Put back what an engine changes in this process."""
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # vLLM's CPU worker replaces it by a function that does nothing.
    set_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
