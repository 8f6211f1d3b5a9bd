"""Absent means stock: without routing, our engine gives stock vLLM's tokens and logprobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.engine import STOCK_WORKER, engine
from support.tiny import VOCABULARY, make_model

from sluice.models.engine.workers import CPU_WORKER
from sluice.models.policy.policy import SkipSet

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


def test_compiled_forward_serves_steps_without_depth_control(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compilation on, stock steps run vLLM's compiled model and routed ones the loop."""
    from sluice.models.engine.loop import LayerLoop

    loops = []
    run = LayerLoop.run
    monkeypatch.setattr(LayerLoop, "run", lambda *args: (loops.append(1), run(*args))[1])
    folder = make_model("llama", models_folder / "compiled")
    prompts = [[1, 2, 3, 4], list(range(40))]
    skip = SkipSet.of(blocks=(3,))
    with engine(folder) as eager:
        expected = eager.generate(prompts, [None, None]), eager.generate(prompts, [skip, skip])
    loops.clear()
    with engine(folder, enforce_eager=False) as compiled:
        compiled_calls = []
        decoder = compiled.runner.get_model().model
        assert not decoder.do_not_compile
        stock = type(decoder).__call__
        monkeypatch.setattr(
            type(decoder),
            "__call__",
            lambda self, *a, **k: (compiled_calls.append(1), stock(self, *a, **k))[1],
        )
        assert compiled.generate(prompts, [None, None]) == expected[0]
        assert compiled_calls
        assert not loops
        compiled_calls.clear()
        assert compiled.generate(prompts, [skip, skip]) == expected[1]
        assert loops
        assert not compiled_calls
        mixed = compiled.generate(prompts, [None, skip])
        assert mixed == [expected[0][0], expected[1][1]]
