"""What only vLLM's V2 model runner does: it chooses CUDA graphs, and warms up with requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine, engine
from support.tiny import make_model

from sluice.models.engine.runners.v2 import RoutedV2Runner
from sluice.models.policy.policy import RoutingPolicy, SkipSet

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
SKIP = SkipSet.of(blocks=(2,))


@pytest.fixture(scope="module")
def running(models_folder: Path) -> Iterator[Engine]:
    with engine(make_model("llama", models_folder / "v2")) as started:
        assert isinstance(started.runner, RoutedV2Runner)
        yield started


@pytest.fixture
def dispatched(running: Engine) -> Iterator[list[int]]:
    """Tokens of the steps for which vLLM was asked which CUDA graph fits."""
    runner = running.runner
    manager, ours = runner.cudagraph_manager, runner.cudagraph_manager.dispatch
    asked: list[int] = []

    def dispatch(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(num_tokens)
        return type(manager).dispatch(manager, num_reqs, num_tokens, *args, **kwargs)

    manager.dispatch = runner._without_graph(dispatch)
    yield asked
    manager.dispatch = ours


def test_a_step_of_ours_runs_in_no_graph(running: Engine, dispatched: list[int]) -> None:
    running.generate(PROMPTS, [None, None], 4)
    assert dispatched == [7, 2, 2, 2]
    dispatched.clear()
    running.generate(PROMPTS, [SKIP, None], 4)
    assert dispatched == []
    # A policy that takes nothing away is vLLM's to run.
    running.generate(PROMPTS, [RoutingPolicy(), None], 4)
    assert dispatched == [7, 2, 2, 2]


def test_requests_that_warm_up_are_not_counted(running: Engine) -> None:
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    runner = running.runner
    worker = running.llm.llm_engine.model_executor.driver_worker.worker

    def warm_up() -> None:
        assert run_mixed_prefill_decode_warmup(
            runner, worker.execute_model, worker.sample_tokens, 8
        )

    before = runner.core._counters.totals
    with runner.core.warming_up():
        warm_up()
    assert (runner.core._counters.totals == before).all()
    warm_up()
    assert (runner.core._counters.totals > before).any()
