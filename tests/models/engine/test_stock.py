"""Absent means stock: without routing, our engine gives stock vLLM's tokens and logprobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.engine import STOCK_WORKER, engine
from support.tiny import VOCABULARY, make_model

from sluice.models.engine.workers import CPU_WORKER

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.0, "logprobs": 3, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 13, "n": 2},
]


def answers(folder: Path, worker: str, **flags: Any) -> list[Any]:
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (5, 33, 64, 100)]
    with engine(folder, worker, **flags) as running:
        return [
            [
                (sample.token_ids, sample.cumulative_logprob)
                for output in running.run(prompts, [None] * len(prompts), 16, **sampling)
                for sample in output.outputs
            ]
            for sampling in SAMPLING
        ]


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_tokens_equal_stock_vllm(family: str, models_folder: Path) -> None:
    folder = make_model(family, models_folder / f"stock-{family}")
    assert answers(folder, CPU_WORKER) == answers(folder, STOCK_WORKER)
