"""Who of those that wait is next: `--group-by-depth`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine import Engine, engine
from support.tiny import VOCABULARY, make_model

from sluice.models.engine.scheduler import DepthQueue
from sluice.models.engine.workers import GROUP_BY_DEPTH_ENV, GROUPING_SCHEDULER
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import ExitRule, Phase, RoutingPolicy, SkipSet

HALF = SkipSet.of(blocks=(1, 2, 3))
LESS = SkipSet.of(blocks=(1, 2))
LONG = 1e6


def request(policy: SkipSet | RoutingPolicy | None, age: float = 0.0, preempted: int = 0) -> Any:
    extra_args = None
    if policy is not None:
        asked = RoutingPolicy(policy) if isinstance(policy, SkipSet) else policy
        extra_args = {EXTRA_ARGS_KEY: RoutingExtraArgs(asked, f"key {id(policy)}").encode()}
    return SimpleNamespace(
        arrival_time=time.time() - age,
        num_preemptions=preempted,
        sampling_params=SimpleNamespace(extra_args=extra_args),
    )


def queue(running: list[Any], waiting: list[Any], patience: float = LONG) -> DepthQueue:
    found = DepthQueue(lambda: running, patience)
    for each in waiting:
        found.add_request(each)
    return found


def order(waiting: DepthQueue) -> list[Any]:
    found = []
    while waiting:
        peeked = waiting.peek_request()
        assert waiting.pop_request() is peeked
        found.append(peeked)
    return found


def test_those_of_the_running_depth_go_first() -> None:
    full, half, less, full_too, half_too = map(request, (None, HALF, LESS, None, HALF))
    waiting = [full, half, less, full_too, half_too]
    assert order(queue([request(HALF)], waiting)) == [half, half_too, less, full, full_too]
    assert order(queue([request(None)], waiting)) == [full, full_too, less, half, half_too]


def test_all_running_ones_count() -> None:
    full, half, less = map(request, (None, HALF, LESS))
    assert order(queue([request(HALF), request(LESS)], [full, half, less])) == [less, half, full]
    assert order(queue([request(HALF), request(None)], [half, less, full])) == [full, less, half]


def test_without_running_ones_it_is_first_come_first_served() -> None:
    waiting = [request(HALF), request(None), request(HALF)]
    assert order(queue([], waiting)) == waiting


def test_who_has_waited_long_enough_is_next() -> None:
    late, fits = request(None, age=3.0), request(HALF)
    assert order(queue([request(HALF)], [fits, late], patience=2.0)) == [late, fits]
    assert order(queue([request(HALF)], [late, fits], patience=4.0)) == [fits, late]


def test_who_was_preempted_is_next() -> None:
    fits, preempted = request(HALF), request(None, preempted=1)
    assert order(queue([request(HALF)], [fits, preempted])) == [preempted, fits]


@pytest.mark.parametrize(
    "policy",
    [
        RoutingPolicy(SkipSet.of(blocks=(1, 2, 3), phase=Phase.PREFILL)),
        RoutingPolicy(exit=ExitRule("confidence", (1,), threshold=0.5)),
    ],
)
def test_layers_that_generated_tokens_may_run_are_not_left_out(policy: RoutingPolicy) -> None:
    full, this, half = request(None), request(policy), request(HALF)
    assert order(queue([request(HALF)], [full, this, half])) == [half, full, this]
    assert order(queue([request(None)], [half, this, full])) == [this, full, half]


def test_a_request_that_ended_after_it_was_looked_at_is_not_taken() -> None:
    first, second = request(None), request(None)
    waiting = queue([], [first, second])
    assert waiting.peek_request() is first
    waiting.remove_request(first)
    assert waiting.pop_request() is second
    with pytest.raises(IndexError):
        waiting.peek_request()


PROMPTS = [[(7 * n + 3 * k) % VOCABULARY for k in range(5 + n)] for n in range(6)]
POLICIES = [None, HALF, None, HALF, None, HALF]


@pytest.fixture(scope="module")
def folder(models_folder: Path) -> Path:
    make_model("llama", models_folder / "scheduler-llama")
    return models_folder / "scheduler-llama"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Engine]:
    with engine(folder, max_num_seqs=2) as running:
        yield running


@pytest.fixture
def grouping(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Engine]:
    monkeypatch.setenv(GROUP_BY_DEPTH_ENV, str(request.param))
    with engine(folder, max_num_seqs=2, scheduler_cls=GROUPING_SCHEDULER) as running:
        yield running


def joined(running: Engine) -> list[int]:
    """Requests, in the order they joined in."""
    order: list[int] = []
    stock = running.scheduler.schedule

    def schedule(*args: Any, **more: Any) -> Any:
        output = stock(*args, **more)
        order.extend(len(new.prompt_token_ids) - 5 for new in output.scheduled_new_reqs)
        return output

    running.scheduler.schedule = schedule
    answers = running.generate(PROMPTS, POLICIES, tokens=8)
    running.scheduler.schedule = stock
    assert answers == running.generate(PROMPTS, POLICIES, tokens=8)
    return order


@pytest.mark.parametrize("grouping", [LONG], indirect=True)
def test_an_engine_groups_and_answers_as_ever(plain: Engine, grouping: Engine) -> None:
    assert joined(plain) == [0, 1, 2, 3, 4, 5]
    # The first two end together; then nobody runs, and the oldest is next.
    assert joined(grouping) == [0, 2, 1, 3, 4, 5]
    expected = plain.generate(PROMPTS, POLICIES, tokens=8)
    assert grouping.generate(PROMPTS, POLICIES, tokens=8) == expected
    assert grouping.generate_preempted(PROMPTS, POLICIES, 8, preempt_at=(3, 7)) == expected


@pytest.mark.parametrize("grouping", [1e-9], indirect=True)
def test_an_engine_without_patience_takes_them_in_turn(grouping: Engine) -> None:
    assert joined(grouping) == [0, 1, 2, 3, 4, 5]
