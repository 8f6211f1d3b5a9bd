"""An engine that times batches of the benchmark's rows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sluice.models.offline.bench.model import VOCABULARY, BenchModel
from sluice.models.offline.bench.rows import Row
from sluice.models.offline.engine import OfflineEngine, Request, offline_engine

_KV_CACHE_BYTES = {BenchModel.DENSE: 5 * 1024**3, BenchModel.MOE: 1024**3}
_SAMPLING = {"ignore_eos": True, "detokenize": False}


class BenchEngine:
    """Runs a row's batch on an engine; `bench_engine` starts one."""

    def __init__(self, engine: OfflineEngine) -> None:
        self.engine = engine

    def seconds(self, row: Row, seed: int, routed: bool) -> float:
        """Time of one batch of `row`, seconds.

        Args:
            row: what to run.
            seed: of the random prompts; equal seeds give equal prompts.
            routed: whether the row's policies are sent; stock vLLM gets the same prompts without.
        """
        requests = _requests(row, seed, routed)
        began = time.perf_counter()
        outputs = self.engine.generate(requests, _SAMPLING)
        wall = time.perf_counter() - began
        return _decode_seconds(outputs) if row.measure == "decode" else wall

    def experts_loaded(self, row: Row, seed: int) -> float:
        """Distinct experts that a layer runs in a step of `row`; every request has a policy."""
        requests = _requests(row, seed, routed=True)
        self.engine.generate(requests, _SAMPLING)
        record = self.engine.take_record(requests[0])
        assert record is not None
        assert record.experts is not None
        loaded = record.experts.loaded_per_step
        assert loaded is not None
        return loaded


@contextmanager
def bench_engine(
    kind: BenchModel,
    model: Path,
    worker: str,
    eager: bool,
    *,
    in_process: bool = False,
    **arguments: Any,
) -> Iterator[BenchEngine]:
    """Start an engine with the flags that all of a benchmark's engines have, and end it.

    Args:
        kind: which of the benchmark's models.
        model: its folder.
        worker: for vLLM's `worker_cls`.
        eager: run without torch.compile.
        in_process: run it in this process, and not in others as a server does.
        arguments: more of vLLM's engine arguments.
    """
    with offline_engine(
        model,
        worker=worker,
        in_process=in_process,
        enforce_eager=eager,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=4608,
        max_num_batched_tokens=4096,
        # Prompts differ from repeat to repeat where a row does not say otherwise.
        enable_prefix_caching=True,
        kv_cache_memory_bytes=_KV_CACHE_BYTES[kind],
        disable_log_stats=False,
        **arguments,
    ) as engine:
        yield BenchEngine(engine)


def _requests(row: Row, seed: int, routed: bool) -> list[Request]:
    rng = random.Random(0 if row.same_prompts else seed)
    return [
        Request(
            [rng.randrange(VOCABULARY) for _ in range(row.prompt_tokens)],
            policy if routed else None,
            row.new_tokens,
        )
        for policy in row.policies
    ]


def _decode_seconds(outputs: list[Any]) -> float:
    """From the last first token of the batch to its last token, by the engine's own clock."""
    stats = [output.metrics for output in outputs]
    began = max(stat.first_token_ts for stat in stats)
    return float(max(stat.last_token_ts for stat in stats) - began)
