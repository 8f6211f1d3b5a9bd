"""What only vLLM's V2 model runner does: it chooses CUDA graphs, and warms up with requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine, engine
from support.planning import on_static_buffers
from support.tiny import make_model
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from sluice.models.engine.runners.v2 import RoutedV2Runner
from sluice.models.policy.policy import RoutingPolicy, SkipSet

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
SKIP = SkipSet.of(blocks=(2,))


@pytest.fixture(scope="module")
def running(models_folder: Path) -> Iterator[Engine]:
    with engine(make_model("llama", models_folder / "v2")) as started:
        assert isinstance(started.runner, RoutedV2Runner)
        yield started


@dataclass
class Graphs:
    """Graphs that vLLM would have on CUDA, for steps of ours: of one token per request, padded."""

    asked: list[int] = field(default_factory=list)
    chosen: list[tuple[Any, int]] = field(default_factory=list)
    """Mode and tokens with padding, by step."""
    context: Any = None
    """Metadata and slots of the step, which a graph reads from buffers."""


PADDING = 2


@pytest.fixture
def graphs(running: Engine, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    runner, graphs = running.runner, Graphs()
    ours, state, config = runner._graphs, runner.model_state, runner.vllm_config
    stock_dispatch, stock_attention = ours._stock_dispatch, state.prepare_attn

    def stock(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        graphs.asked.append(num_tokens)
        if runner.planned_step is None or num_reqs < num_tokens:
            return stock_dispatch(num_reqs, num_tokens, *args, **kwargs)
        padded = num_tokens + PADDING
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL, num_tokens=padded, num_reqs=padded
        )

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        choice = ours._dispatch(*args, **kwargs)
        graphs.chosen.append((choice.cg_mode, choice.num_tokens))
        return choice

    def prepare(batch: Any, _mode: Any, tables: Any, slots: Any, *others: Any, **more: Any) -> Any:
        built = stock_attention(batch, CUDAGraphMode.NONE, tables, slots, *others, **more)
        graphs.context = built, build_slot_mappings_by_layer(slots, others[1])
        return built

    def replay(choice: Any) -> Any:
        metadata, slots = graphs.context
        with set_forward_context(metadata, config, num_tokens=2, slot_mapping=slots):
            return ours._run(choice)

    monkeypatch.setattr(ours, "_stock_dispatch", stock)
    monkeypatch.setattr(state, "prepare_attn", prepare)
    monkeypatch.setattr(runner.cudagraph_manager, "dispatch", dispatch)
    monkeypatch.setattr(runner.cudagraph_manager, "run_fullgraph", replay)
    return graphs


def test_a_step_that_no_launch_serves_runs_in_no_graph(running: Engine, graphs: Graphs) -> None:
    running.generate(PROMPTS, [None, None], 4)
    assert graphs.asked == [7, 2, 2, 2]
    graphs.chosen.clear()
    running.generate(PROMPTS, [SKIP, None], 4)
    assert graphs.chosen == [(CUDAGraphMode.NONE, tokens) for tokens in (7, 2, 2, 2)]


def test_decode_steps_run_in_the_place_of_a_graph(
    running: Engine, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = running.generate(PROMPTS, [SKIP, None], 4)
    steps = on_static_buffers(running, monkeypatch)
    assert running.runner.routed.loop.captured.capture(2 + PADDING)
    graphs.chosen.clear()
    ran = []
    stock_run = running.runner.core.run_captured

    def run(step: Any, positions: Any, input_ids: Any, rows: int) -> Any:
        ran.append(rows)
        return stock_run(step, positions, input_ids, rows)

    monkeypatch.setattr(running.runner.core, "run_captured", run)
    assert running.generate(PROMPTS, [SKIP, None], 4) == expected
    assert ran == [2 + PADDING] * 3
    assert steps == []
    assert [mode for mode, _ in graphs.chosen] == [CUDAGraphMode.NONE, *[CUDAGraphMode.FULL] * 3]


def test_a_policy_that_takes_nothing_away_is_vllms_to_run(running: Engine, graphs: Graphs) -> None:
    running.generate(PROMPTS, [RoutingPolicy(), None], 4)
    assert graphs.asked == [7, 2, 2, 2]
    assert running.runner.planned_step is None


def test_requests_that_warm_up_are_not_counted(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    runner = running.runner
    worker = running.llm.llm_engine.model_executor.driver_worker.worker

    def warm_up() -> None:
        assert run_mixed_prefill_decode_warmup(
            runner, worker.execute_model, worker.sample_tokens, 8
        )

    noted: list[object] = []
    # Requests of earlier tests may still be in the batch.
    for name in ("note", "note_stock"):
        monkeypatch.setattr(runner.core._recorder, name, lambda *told, **_: noted.append(told))
    with runner.core.warming_up():
        warm_up()
    assert noted == []
    warm_up()
    assert noted
