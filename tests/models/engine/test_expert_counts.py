"""Counters and reports say what the routers did, row by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.dispatch import standing_before
from support.engine import Engine, engine
from support.expert_policies import (
    CONTRAST,
    EVERYTHING,
    LAST,
    MASK,
    OEA,
    TOP_1,
    TOP_4,
    XSHARE,
    prompt_of,
)
from support.planning import plan_by
from support.tiny import make_model

from sluice.kernels.ops.router_config import EXTRA, MASKED, ROWS
from sluice.kernels.ops.router_scores import plain_scores, selection_scores
from sluice.models.engine.plan import LayerNeeds, LayerPlan, StepShape, Work, compact
from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.policy import RoutingPolicy, SkipSet
from sluice.models.telemetry.request_record import RoutingRecord

TOKENS = 6


class Seen:
    """What went through the routers, counted one row at a time."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._step: Any = None
        shape = runner.routed.expert_shape
        self.total = np.zeros((len(shape.layers), shape.experts + EXTRA), dtype=np.int64)
        self.active: dict[str, list[int]] = defaultdict(list)
        self.taken: dict[str, int] = defaultdict(int)
        self.loaded: dict[str, list[int]] = defaultdict(list)
        self.weak: dict[str, int] = defaultdict(int)

    def run(self, stock: Any, step: Any, *args: Any) -> Any:
        self._step = step
        try:
            return stock(step, *args)
        finally:
            self._step = None

    def route(self, stock: Any, place: int, logits: torch.Tensor, own: Any) -> Any:
        router = self._runner.routed.router
        spec = router._specs[place]
        choice = selection_scores(plain_scores(logits, spec.sigmoid), spec)
        usual = choice.topk(spec.top_k, dim=-1).indices
        weights, ids = stock(place, logits, own)
        rows = [set(row) for row in ids.tolist()]
        missing = [len(set(a) - b) for a, b in zip(usual.tolist(), rows, strict=True)]
        for chosen in rows:
            self.total[place, sorted(chosen)] += 1
        self.total[place, ROWS] += len(rows)
        self.total[place, MASKED] += sum(missing)
        if self._step is not None and router._call is not None:
            self._of_requests(router._call.tokens.tolist(), rows, missing)
        return weights, ids

    def _of_requests(self, tokens: list[int], rows: list[set[int]], missing: list[int]) -> None:
        step = self._step
        loaded = len(set.union(*rows))
        for state in step.states.values():
            self.loaded[state.extra.request_key].append(loaded)
        for token, chosen, gone in zip(tokens, rows, missing, strict=True):
            number = int(step.plan.shape.requests[token])
            if number >= len(step.requests.ids):
                owner = int(step.weak.owners[number - len(step.requests.ids)])
                self.weak[step.states[owner].extra.request_key] += 1
            elif number in step.states:
                record = step.states[number].extra.request_key
                self.active[record].append(len(chosen))
                self.taken[record] += gone


def counted(running: Engine) -> np.ndarray:
    return running.counts().selections


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def running(request: pytest.FixtureRequest, models_folder: Path) -> Iterator[Engine]:
    folder = make_model(request.param, models_folder / f"counters-{request.param}")
    with engine(folder, enable_prefix_caching=False, max_num_batched_tokens=64) as made:
        yield made


def test_counters_and_reports_are_what_ran(running: Engine) -> None:
    asked = {**EVERYTHING, "oea": OEA, "xshare": XSHARE, "empty": RoutingPolicy()}
    prompts = [prompt_of(10 + 5 * index, seed=index) for index in range(len(asked))]
    before = counted(running)
    with standing_before(running.runner, Seen(running.runner)) as seen:
        running.generate(prompts, list(asked.values()), TOKENS, records=list(asked))
        found = counted(running) - before
    assert found[:, ROWS].sum() > 0
    assert found.tolist() == seen.total.tolist()
    for name, policy in asked.items():
        if policy is None:
            continue
        record = running.take_record(name)
        assert record is not None
        if policy.experts.empty:
            assert record.experts is None
            continue
        told = record.experts
        assert told is not None
        active = seen.active[name]
        assert len(active) > 0
        assert told.active_mean == pytest.approx(sum(active) / len(active))
        assert told.masked == seen.taken[name]
        loaded = seen.loaded[name]
        assert told.loaded_per_step == pytest.approx(sum(loaded) / len(loaded))
        assert told.neighbour_dependent == (name in ("oea", "xshare"))
        layers = len(running.runner.routed.expert_shape.layers)
        assert told.weak_tokens * layers == seen.weak[name]
        assert (told.weak_tokens > 0) == name.startswith("contrast")


def test_stock_steps_are_counted(running: Engine) -> None:
    """With and without a policy that leaves every step to vLLM."""
    shape = running.runner.routed.expert_shape
    for policy in (None, RoutingPolicy()):
        before = counted(running)
        with standing_before(running.runner, Seen(running.runner)) as seen:
            running.generate([prompt_of(20, seed=3)], [policy], TOKENS)
        found = counted(running) - before
        rows = 20 + TOKENS - 1
        assert found.tolist() == seen.total.tolist()
        assert found[:, ROWS].tolist() == [rows] * len(shape.layers)
        assert found[:, :-2].sum(axis=1).tolist() == [rows * shape.top_k] * len(shape.layers)
        assert not found[:, MASKED].any()


def test_steps_before_a_control_acts_are_counted(running: Engine) -> None:
    """A re-mix of the last prompt token leaves all other steps to vLLM."""
    before = counted(running)
    with standing_before(running.runner, Seen(running.runner)) as seen:
        running.generate([prompt_of(100, seed=4)], [LAST], TOKENS, records=["last"])
    found = counted(running) - before
    assert found.tolist() == seen.total.tolist()
    assert found[:, ROWS].tolist() == [100 + TOKENS - 1] * len(found)


PROMPT = 30


def full_cost(running: Engine) -> tuple[float, float]:
    """Of a row at full depth: of all rows, each with its share of the heads, and of generated."""
    cost = running.runner.routed.cost
    layers = float(cost.modules.sum())
    rows = PROMPT + TOKENS - 1
    return layers + cost.head * TOKENS / rows, layers + cost.head


def fraction(running: Engine, policy: RoutingPolicy, neighbours: int = 0) -> RoutingRecord:
    prompts = [prompt_of(PROMPT + index, seed=9 + index) for index in range(1 + neighbours)]
    policies = [policy, *[RoutingPolicy()] * neighbours]
    names = ["own", *[f"other {index}" for index in range(neighbours)]]
    running.generate(prompts, policies, TOKENS, records=names)
    record = running.take_record("own")
    assert record is not None
    return record


def test_the_compute_fraction_counts_experts(running: Engine) -> None:
    cost, shape = running.runner.routed.cost, running.runner.routed.expert_shape
    full, generated = full_cost(running)
    layers, k = len(shape.layers), shape.top_k
    assert cost.expert > 0
    assert cost.head == running.runner.routed.stack.head > 0
    for policy, experts in ((TOP_1, 1), (TOP_4, 4)):
        record = fraction(running, policy)
        more = layers * (experts - k) * cost.expert
        assert record.compute_fraction == pytest.approx(1 + more / full)
        assert record.generated_compute_fraction == pytest.approx(1 + more / generated)
        assert record.experts.active_mean == experts
    assert fraction(running, MASK).compute_fraction == pytest.approx(1.0)
    contrast = fraction(running, CONTRAST)
    assert contrast.compute_fraction == pytest.approx(2 - layers * (k - 1) * cost.expert / full)


def wide(shape: StepShape, needs: Sequence[LayerNeeds]) -> list[LayerPlan]:
    """Run the MLP for all rows wherever one wants it, and drop what the others get."""
    return [
        replace(plan, run_mlp=Work.keeping(shape.everything, each.mlp)) if len(each.mlp) else plan
        for plan, each in zip(compact(shape, needs), needs, strict=True)
    ]


def test_rows_that_are_kept_in_a_layer_save_nothing_there(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report does not depend on how the cost model plans layers."""
    skip = SkipSet.of(mlp=(2, 3))
    policy = RoutingPolicy(skip, experts=ExpertPolicy(top_k=1))
    records = []
    for planner in (compact, wide):
        plan_by(running, monkeypatch, planner)
        records.append(fraction(running, policy, neighbours=2))
    cost, shape = running.runner.routed.cost, running.runner.routed.expert_shape
    full, _ = full_cost(running)
    left = full - float(cost.modules[[2, 3], 1].sum())
    left -= (len(shape.layers) - 2) * (shape.top_k - 1) * cost.expert
    for record in records:
        assert record.compute_fraction == pytest.approx(left / full)
