"""What differs between vLLM's model runners: how requests come, go, wait and are sampled.

The tests hold for both; `make test-v2` runs them on V2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import Engine, engine
from support.reference import Reference
from support.references.choices import threshold_between
from support.tiny import LAYERS, VOCABULARY, make_model

from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)

TOKENS = 16
EXITS = tuple(range(LAYERS - 1))
Asked = tuple[list[int], RoutingPolicy | None]


def prompt_of(length: int, seed: int) -> list[int]:
    return [(37 * i * i + 11 * i + 13 * seed) % VOCABULARY for i in range(length)]


@pytest.fixture(scope="module")
def reference(models_folder: Path) -> Reference:
    return Reference(make_model("llama", models_folder / "runner"))


@pytest.fixture(scope="module")
def asked(reference: Reference) -> list[Asked]:
    """Policies of every kind, and prompts of which some need several steps."""
    threshold = threshold_between(
        reference.scores(prompt_of(45, 0), "confidence", EXITS, TOKENS), 0.8
    )
    policies = [
        None,
        *(
            RoutingPolicy(exit=ExitRule("confidence", EXITS, threshold=threshold, kv=kv))
            for kv in MissingKV
        ),
        RoutingPolicy(SkipSet.of(blocks=(2, 4))),
        RoutingPolicy(SkipSet.of(attention=(1,), mlp=(3,), phase=Phase.DECODE)),
        RoutingPolicy(adaptive=AdaptiveRule("similarity", budget=0.5)),
    ]
    return [(prompt_of(20 + 15 * i, i), policy) for i, policy in enumerate(policies)]


@pytest.fixture(scope="module")
def expected(reference: Reference, asked: list[Asked]) -> list[list[int]]:
    return [reference.run(p, policy or RoutingPolicy(), TOKENS).tokens for p, policy in asked]


FLAGS: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def running(overlapping: bool, reference: Reference, models_folder: Path) -> Iterator[Engine]:
    with engine(models_folder / "runner", **FLAGS) as started:
        overlaps = type(started.scheduler).__name__ == "AsyncScheduler"
        assert overlaps == overlapping
        yield started


def answers(
    running: Engine,
    asked: Sequence[Asked],
    starts: Sequence[int],
    before_step: Callable[[int, list[str]], None] = lambda step, names: None,
) -> dict[int, list[int]]:
    """Answers by request; request `i` is added before step `starts[i]`."""
    core = running.llm.llm_engine
    requests, params = running._requests(*zip(*asked, strict=True), TOKENS, None, {})
    names = [f"{id(asked)}-{i}" for i in range(len(asked))]
    found: dict[int, list[int]] = {}
    step = 0
    while step <= max(starts) or core.has_unfinished_requests():
        for i, start in enumerate(starts):
            if start == step:
                core.add_request(names[i], requests[i], params[i])
        before_step(step, names)
        for output in core.step():
            if output.finished:
                found[names.index(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 500
    return found


def nothing_is_kept(running: Engine) -> bool:
    """A runner learns with the next step that a request has ended."""
    running.generate([[1, 2]], [None], 1)
    return len(running.runner.routed.batch) == 0


def test_requests_come_and_go(
    running: Engine, asked: list[Asked], expected: list[list[int]]
) -> None:
    """Prompts in chunks among others' tokens; places in the batch change from step to step."""
    assert running.llm.reset_prefix_cache()
    order = [3, 0, 5, 1, 4, 2]
    starts = [0, 1, 2, 5, 9, 12]
    found = answers(running, [asked[i] for i in order], starts)
    assert [found[order.index(i)] for i in range(len(asked))] == expected
    assert nothing_is_kept(running)


def test_an_abort_in_mid_step(
    running: Engine,
    asked: list[Asked],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients that leave while the model runs: neighbours do not notice, and nothing is kept."""
    assert running.llm.reset_prefix_cache()
    core = running.llm.llm_engine
    executor = core.engine_core.engine_core.model_executor
    run = executor.execute_model
    leaving: list[str] = []

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        core.abort_request([leaving.pop()] if leaving else [])
        return result

    def before_step(step: int, names: list[str]) -> None:
        if step in (7, 9):
            leaving.append(names[1 if step == 7 else 4])

    monkeypatch.setattr(executor, "execute_model", execute_model)
    found = answers(running, asked, [0] * len(asked), before_step)
    assert found == {i: tokens for i, tokens in enumerate(expected) if i not in (1, 4)}
    assert nothing_is_kept(running)


@pytest.mark.parametrize("keep_cache", [False, True])
def test_preempted_requests_repeat_what_was_decided(
    running: Engine, asked: list[Asked], expected: list[list[int]], keep_cache: bool
) -> None:
    """V2 drops a preempted request and takes it as a new one later."""
    assert running.llm.reset_prefix_cache()
    prompts, policies = zip(*asked, strict=True)
    found = running.generate_preempted(
        prompts, policies, TOKENS, {2, 9, 10, 20}, keep_cache=keep_cache
    )
    assert found == expected
    assert nothing_is_kept(running)


def test_samples_and_logprobs(running: Engine, asked: list[Asked]) -> None:
    """Several answers to a prompt, and logprobs of logits that an exit test has computed.

    The prompts are short: on a CPU, vLLM's V1 runner cannot draw from a seed if it cuts a prompt.
    """
    policies = [policy for _, policy in asked]
    prompts = [prompt_of(3, seed) for seed in range(len(policies))]
    sampling = {"temperature": 1.0, "seed": 5, "n": 2, "logprobs": 3}
    alone = [
        running.run([prompt], [policy], TOKENS, **sampling)[0].outputs
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    together = running.run(prompts, policies, TOKENS, **sampling)
    for outputs, expected in zip(together, alone, strict=True):
        first, second = outputs.outputs
        assert first.token_ids != second.token_ids
        for output, wanted in zip(outputs.outputs, expected, strict=True):
            assert output.token_ids == wanted.token_ids
            assert output.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-3)


def test_logprobs_are_those_of_the_layer_that_was_left(
    running: Engine, asked: list[Asked], reference: Reference
) -> None:
    """Every token leaves after layer 2: its logits are the LM head's of that layer."""
    prompt, kv = asked[0][0], MissingKV.PROPAGATE
    policy = RoutingPolicy(exit=ExitRule("confidence", (2,), threshold=0.0, kv=kv))
    (output,) = running.run([prompt], [policy], 2, logprobs=1)[0].outputs
    first, second = output.token_ids
    states = reference.states([*prompt, first])
    wanted = torch.log_softmax(reference._head(states[3, -1]), dim=-1)
    assert output.logprobs[1][second].logprob == pytest.approx(float(wanted[second]), abs=1e-3)
