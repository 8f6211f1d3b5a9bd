"""A real vLLM engine inside the test process: starts in seconds, because nothing is spawned."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sluice.models.depth.prefix_sharing import cache_salt
from sluice.models.engine.workers import CPU_WORKER
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy, SkipSet
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.inbox import Inbox
from sluice.models.telemetry.records import Records
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.vllm_adapter.patches.api_telemetry import inbox_of

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
BLOCK = 32


class Engine:
    """vLLM's `LLM` with policies as the HTTP edge would hand them over."""

    def __init__(self, folder: Path, worker: str = CPU_WORKER, **flags: Any) -> None:
        from vllm import LLM

        settings = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 512,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 64 * 1024**2,
            "worker_cls": worker,
            "seed": 0,
        }
        # Where a CPU has AMX, vLLM would choose a backend that takes bfloat16 only.
        if "kv_lora_rank" in json.loads((folder / "config.json").read_text()):
            settings["attention_backend"] = "CPU_MLA"
        self.llm = LLM(str(folder), **{**settings, **flags})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        skips: Sequence[SkipSet | RoutingPolicy | None],
        tokens: int = 12,
        **sampling: Any,
    ) -> list[list[int]]:
        """One batch of requests; each gets its own policy, `None` being no policy at all."""
        return [out.outputs[0].token_ids for out in self.run(prompts, skips, tokens, **sampling)]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        skips: Sequence[SkipSet | RoutingPolicy | None],
        tokens: int = 12,
        records: Sequence[str] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """As `generate`, with vLLM's whole outputs."""
        requests, params = self._requests(prompts, skips, tokens, records, sampling)
        return self.llm.generate(requests, params, use_tqdm=False)

    def generate_preempted(
        self,
        prompts: Sequence[Sequence[int]],
        skips: Sequence[SkipSet | RoutingPolicy | None],
        tokens: int,
        preempt_at: Collection[int],
        *,
        keep_cache: bool = False,
        records: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """As `generate`, preempting every running request before the numbered steps.

        Without `keep_cache` the prefix cache is emptied as well, so everything runs again.
        """
        engine = self.llm.llm_engine
        requests, params = self._requests(prompts, skips, tokens, records, {})
        names = [uuid.uuid4().hex for _ in requests]
        for name, request, sampling in zip(names, requests, params, strict=True):
            engine.add_request(name, request, sampling)
        answers: dict[str, list[int]] = {}
        step = 0
        while engine.has_unfinished_requests():
            if step in preempt_at:
                self._preempt_all(keep_cache)
            for output in engine.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
            assert step < 1000, (self.scheduler.running, list(self.scheduler.waiting))
        return [answers[name] for name in names]

    def _preempt_all(self, keep_cache: bool) -> None:
        scheduler = self.scheduler
        if not keep_cache:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
            return
        now = time.monotonic()
        while scheduler.running:
            scheduler._preempt_request(scheduler.running.pop(), now)
        # As vLLM does where it preempts everything: workers drop their copy of the batch.
        scheduler.prev_step_scheduled_req_ids.clear()

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        skips: Sequence[SkipSet | RoutingPolicy | None],
        tokens: int,
        records: Sequence[str] | None,
        sampling: dict[str, Any],
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        from vllm import SamplingParams

        requests, params = [], []
        for index, (prompt, skip) in enumerate(zip(prompts, skips, strict=True)):
            request: dict[str, Any] = {"prompt_token_ids": list(prompt)}
            extra_args = None
            if skip is not None:
                policy = RoutingPolicy(skip) if isinstance(skip, SkipSet) else skip
                record = records[index] if records else uuid.uuid4().hex
                extra = RoutingExtraArgs(policy, record)
                extra_args = {EXTRA_ARGS_KEY: extra.encode()}
                salt = cache_salt(extra, None)
                if salt:
                    request["cache_salt"] = salt
            requests.append(request)
            params.append(
                SamplingParams(
                    max_tokens=tokens,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=extra_args,
                    **{"temperature": 0.0, **sampling},
                )
            )
        return requests, params

    def settle(self) -> None:
        """Step until the engine has told all: vLLM's `LLM` stops at the last answer."""
        core = self.llm.llm_engine.engine_core.engine_core
        while self.scheduler.has_requests() or core.batch_queue:
            self.llm.llm_engine.step()

    def counts(self) -> Counts:
        """What the engine has counted since its start."""
        self.settle()
        routed, engines = self.runner.core.routed, self._inbox.engines
        shape = routed.expert_shape
        experts = (0, 0) if shape is None else (len(shape.layers), shape.experts)
        zeros = Counts.zeros(len(routed.stack.layers), *experts)
        return zeros + engines[0].read().total if engines else zeros

    def take_record(self, name: str) -> RoutingRecord | None:
        """What an ended request ran, once."""
        self.settle()
        core = self.runner.core
        return Records(self._inbox, core.routed.cost, core.routed.expert_shape).take_now(name)

    @property
    def _inbox(self) -> Inbox:
        return inbox_of(self.llm.llm_engine.output_processor)

    def close(self) -> None:
        """End the engine."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm

    @property
    def runner(self) -> Any:
        """The live model runner."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def scheduler(self) -> Any:
        """The live scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def engine(folder: Path, worker: str = CPU_WORKER, **flags: Any) -> Iterator[Engine]:
    """An engine that leaves the process fit for the next one, also where it does not start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with ExitStack() as stack:
        stack.callback(cleanup_dist_env_and_memory)
        running = Engine(folder, worker, **flags)
        stack.callback(running.close)
        yield running
