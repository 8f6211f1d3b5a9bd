"""A vLLM engine inside this process, where settings run as a server would run them."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sluice.models.engine.workers import CPU_WORKER, CUDA_WORKER
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.policy.axes import ATTENTION, DECODE, EXECUTED, MODULES
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.resolve import resolve
from sluice.models.routing.schema import parse_routing
from sluice.models.telemetry.counter_file import TELEMETRY_ENV
from sluice.models.telemetry.request_record import RoutingRecord

_BLOCK = 128
"""Tokens of a K/V block at most, of vLLM's defaults."""

_PREFILL_TOKENS = 8192
"""Prompt tokens that a step runs at most, unless a single prompt is longer."""


@dataclass(frozen=True)
class Work:
    """What a set of requests ran, by the engine's own records.

    Attributes:
        generated: generated tokens that went through the model; a request's last one never does.
        mean_layers: layers per such token; half a layer is an attention or an MLP alone.
        compute_fraction: share of full depth's compute on all tokens.
        generated_fraction: the same on generated tokens.
    """

    generated: int
    mean_layers: float
    compute_fraction: float
    generated_fraction: float

    @classmethod
    def of(cls, records: Iterable[RoutingRecord]) -> Work:
        """Sum records; each weighs as many tokens as it counts."""
        rows = generated = executed = 0
        compute = own = 0.0
        for record in records:
            counts = record.counts
            # Layer 0 names every row once.
            tokens = int(counts[:, 0, ATTENTION].sum())
            decoded = int(counts[DECODE, 0, ATTENTION].sum())
            rows += tokens
            generated += decoded
            executed += int(counts[DECODE, ..., EXECUTED].sum())
            compute += record.compute_fraction * tokens
            own += record.generated_compute_fraction * decoded
        per_token = max(generated, 1)
        return cls(
            generated,
            executed / len(MODULES) / per_token,
            compute / rows if rows else 1.0,
            own / generated if generated else 1.0,
        )


@dataclass(frozen=True)
class Outcome:
    """Answers to a list of prompts.

    Attributes:
        tokens: of each prompt's answer, the end token included.
        decoded: tokens generated in steps before which every request of the batch had its first.
        seconds: that these steps took.
        work: of all requests, or None of requests without a policy.
    """

    tokens: tuple[tuple[int, ...], ...]
    decoded: int
    seconds: float
    work: Work | None


class CalibrationEngine:
    """An engine that answers prompts under one policy after the other; made by `engine_of`."""

    def __init__(self, llm: Any, profile: Profile) -> None:
        self._llm: Any = llm
        self.profile = profile
        self.expert_answer: Mapping[str, Any] = llm.collective_rpc("describe_experts")[0]

    @property
    def vllm_config(self) -> Any:
        """VLLM's configuration of the engine."""
        return self._llm.llm_engine.vllm_config

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        policy: RoutingPolicy | None,
        max_tokens: Sequence[int],
        ends: Collection[int],
        batch: int,
    ) -> Outcome:
        """Greedy answers.

        Args:
            prompts: token ids.
            policy: of all of them; None sends none, as a client does that asks for nothing.
            max_tokens: of each prompt's answer.
            ends: tokens that end an answer.
            batch: requests at a time; the next ones wait until all of a batch have ended.
        """
        tokens: list[tuple[int, ...]] = []
        records: list[RoutingRecord] = []
        decoded, seconds = 0, 0.0
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            names = [uuid.uuid4().hex for _ in prompts[part]]
            for name, prompt, limit in zip(names, prompts[part], max_tokens[part], strict=True):
                self._add(name, prompt, policy, limit, ends)
            answers, own_decoded, own_seconds = self._run(names)
            tokens += [tuple(answers[name]) for name in names]
            decoded += own_decoded
            seconds += own_seconds
            if policy is not None:
                records += [self._record(name) for name in names]
        work = None if policy is None else Work.of(records)
        return Outcome(tuple(tokens), decoded, seconds, work)

    def close(self) -> None:
        """End the engine and let its memory go."""
        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()

    def _add(
        self,
        name: str,
        prompt: Sequence[int],
        policy: RoutingPolicy | None,
        limit: int,
        ends: Collection[int],
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        extra_args = None
        if policy is not None:
            # Without a prefix cache there is nothing that a salt keeps apart.
            extra_args = {EXTRA_ARGS_KEY: RoutingExtraArgs(policy, name).encode()}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=limit,
            # Only `ends` ends an answer, whatever the model's files say.
            ignore_eos=True,
            stop_token_ids=sorted(ends),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args,
        )
        self._llm.llm_engine.add_request(name, request, params)

    def _run(self, names: Sequence[str]) -> tuple[dict[str, list[int]], int, float]:
        """Step until all have ended: answers, and how many tokens were decoded in what time."""
        engine = self._llm.llm_engine
        answers: dict[str, list[int]] = {name: [] for name in names}
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

    def _record(self, name: str) -> RoutingRecord:
        found = self._llm.collective_rpc("take_routing_record", args=(name,))[0]
        if found is None:
            raise RuntimeError(f"the engine kept no record of request {name}")
        return RoutingRecord.from_wire(found)


def _flags(subject: HFModel, longest: int, at_once: int) -> dict[str, Any]:
    return {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "max_model_len": longest,
        "max_num_seqs": at_once,
        "max_num_batched_tokens": max(longest, min(at_once * longest, _PREFILL_TOKENS)),
        # Every prompt runs in full each time it is asked, and is counted.
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": _kv_cache_bytes(subject, longest, at_once),
        "worker_cls": CUDA_WORKER if subject.device.type == "cuda" else CPU_WORKER,
        "use_tqdm_on_load": False,
        "seed": 0,
    }


def _kv_cache_bytes(subject: HFModel, longest: int, at_once: int) -> int:
    """Enough for `at_once` requests of `longest` tokens."""
    config = subject.config
    dtype = subject.dtype if isinstance(subject.dtype, torch.dtype) else config.dtype
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        width = latent + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_key_value_heads * head
    # vLLM keeps one block for itself.
    blocks = at_once * -(-longest // _BLOCK) + 1
    if getattr(config, "sliding_window", None) is not None:
        # Layers with a window have blocks of their own, one as large as the others' after rounding.
        blocks *= 2
    size = width * (dtype or torch.float32).itemsize
    return int(blocks * _BLOCK * size * subject.layers)


@contextmanager
def _process_kept(profile: Path) -> Iterator[None]:
    """Set the environment that the engine reads; put back what it changes in this process."""
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # vLLM's CPU worker replaces it by a function that does nothing.
    set_threads = torch.set_num_threads
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        PROFILE_ENV: str(profile),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop(TELEMETRY_ENV, None)
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


_SERVED = "calibrated"


def resolver(
    vllm_config: Any, profile: Profile, expert_answer: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], RoutingPolicy]:
    """What makes a policy of a `routing` object without a preset, as a server would.

    Args:
        vllm_config: of the engine that runs the policies.
        profile: of its model.
        expert_answer: a worker's `describe_experts`.

    Returns:
        It raises `CalibrationError` where a server would answer with an error, and names the field.

    Raises:
        ProfileError: the profile was made for another model.
        FingerprintError: the model's files cannot be read.
    """
    capabilities = Capabilities.of(
        vllm_config, (_SERVED,), profile, expert_answer, expert_routing=True
    )

    def policy(routing: Mapping[str, Any]) -> RoutingPolicy:
        try:
            return resolve(parse_routing(routing), capabilities)
        except RoutingError as error:
            raise CalibrationError(f"{error.param}: {error.message}") from None

    return policy
