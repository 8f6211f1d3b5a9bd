"""Two engines side by side, and one timed batch on one of them."""

from __future__ import annotations

import random
import time
import uuid
from pathlib import Path
from typing import Any

from sluice.models.offline.bench.model import VOCABULARY, BenchModel
from sluice.models.offline.bench.rows import Row
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs

_KV_CACHE_BYTES = {BenchModel.DENSE: 5 * 1024**3, BenchModel.MOE: 1024**3}


class BenchEngine:
    """A vLLM engine in processes of its own, as a server has it."""

    def __init__(self, kind: BenchModel, model: Path, worker: str, eager: bool) -> None:
        from vllm import LLM

        self._llm = LLM(
            str(model),
            worker_cls=worker,
            enforce_eager=eager,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=4608,
            max_num_batched_tokens=4096,
            # Prompts differ from repeat to repeat where a row does not say otherwise.
            enable_prefix_caching=True,
            kv_cache_memory_bytes=_KV_CACHE_BYTES[kind],
            disable_log_stats=False,
            seed=0,
        )

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()

    @property
    def runner(self) -> Any:
        """The model runner, of an engine in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`)."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def seconds(self, row: Row, seed: int, routed: bool) -> float:
        """Time of one batch of `row`, seconds.

        Args:
            row: what to run.
            seed: of the random prompts; equal seeds give equal prompts.
            routed: whether the row's policy is sent; stock vLLM gets the same prompts without.
        """
        began = time.perf_counter()
        outputs = self._run(row, seed, [uuid.uuid4().hex for _ in row.policies] if routed else None)
        wall = time.perf_counter() - began
        return wall if row.measure == "prefill" else _decode_seconds(outputs)

    def experts_loaded(self, row: Row, seed: int) -> float:
        """Distinct experts that a layer runs in a step of `row`; every request has a policy."""
        records = [uuid.uuid4().hex for _ in row.policies]
        self._run(row, seed, records)
        answers = self._llm.collective_rpc("take_routing_record", args=(records[0],))
        return float(answers[0]["experts"]["loaded_per_step"])

    def _run(self, row: Row, seed: int, records: list[str] | None) -> list[Any]:
        from vllm import SamplingParams

        rng = random.Random(0 if row.same_prompts else seed)
        prompts = [
            {"prompt_token_ids": [rng.randrange(VOCABULARY) for _ in range(row.prompt_tokens)]}
            for _ in row.policies
        ]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=row.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={EXTRA_ARGS_KEY: RoutingExtraArgs(policy, records[number]).encode()}
                if records is not None and policy is not None
                else None,
            )
            for number, policy in enumerate(row.policies)
        ]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs


def _decode_seconds(outputs: list[Any]) -> float:
    """From the last first token of the batch to its last token, by the engine's own clock."""
    stats = [output.metrics for output in outputs]
    began = max(stat.first_token_ts for stat in stats)
    return float(max(stat.last_token_ts for stat in stats) - began)
