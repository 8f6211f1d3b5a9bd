"""The weak pass of a contrast: K/V of its own, never published, given back with its request's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engine import BLOCK, Engine, engine
from support.expert_policies import CONTRAST, FAR_CONTRAST, MASK, prompt_of
from support.references.experts import ExpertReference
from support.tiny import LAYERS, make_model
from support.written import record_writes

from sluice.models.policy.policy import RoutingPolicy

PROMPT = prompt_of(2 * BLOCK + 5, seed=5)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def served(
    request: pytest.FixtureRequest, models_folder: Path
) -> Iterator[tuple[Engine, ExpertReference]]:
    folder = make_model(request.param, models_folder / f"contrast-{request.param}")
    with engine(folder, enable_prefix_caching=True, max_num_batched_tokens=48) as running:
        yield running, ExpertReference(folder)


@pytest.fixture(autouse=True)
def _cold(served: tuple[Engine, ExpertReference]) -> None:
    assert served[0].llm.reset_prefix_cache()


def free_blocks(running: Engine) -> int:
    return int(running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def published(running: Engine) -> int:
    """Blocks that the prefix cache knows."""
    return len(running.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)


def groups(running: Engine) -> dict[str, int]:
    """Cache group of every layer."""
    listed = running.runner.kv_cache_config.kv_cache_groups
    return {name: index for index, group in enumerate(listed) for name in group.layer_names}


def windowed(running: Engine) -> bool:
    return len(set(groups(running).values())) > 1


def run(
    running: Engine, prompt: list[int], policy: RoutingPolicy | None, tokens: int
) -> tuple[list[int], int]:
    output = running.run([prompt], [policy], tokens)[0]
    return list(output.outputs[0].token_ids), int(output.num_cached_tokens)


def test_prompts_over_several_steps_and_blocks(served: tuple[Engine, ExpertReference]) -> None:
    """The prompt is longer than a step, a block, and gpt_oss's window."""
    running, reference = served
    for policy in (CONTRAST, FAR_CONTRAST):
        expected = reference.run(PROMPT, policy.experts, 12).tokens
        assert run(running, PROMPT, policy, 12)[0] == expected
    assert run(running, PROMPT, CONTRAST, 12) != run(running, PROMPT, None, 12)


def test_strong_blocks_are_stock_and_the_weak_pass_publishes_none(
    served: tuple[Engine, ExpertReference],
) -> None:
    running, _ = served
    before = free_blocks(running)
    tokens, cached = run(running, PROMPT, CONTRAST, BLOCK)
    assert cached == 0
    of_contrast = published(running)
    # Same tokens, so the same blocks as if they were a prompt.
    turn = [*PROMPT, *tokens[:-1]]
    assert running.llm.reset_prefix_cache()
    expected, _ = run(running, [*turn, 1, 2], None, 6)
    assert running.llm.reset_prefix_cache()
    run(running, turn, None, 1)
    assert published(running) == of_contrast > 0
    assert running.llm.reset_prefix_cache()
    assert run(running, PROMPT, CONTRAST, BLOCK) == (tokens, 0)
    found, cached = run(running, [*turn, 1, 2], None, 6)
    assert found == expected
    # A layer with a window has given its early blocks back, and that ends its hits sooner.
    whole = len(turn) // BLOCK * BLOCK
    assert cached >= 2 * BLOCK if windowed(running) else cached == whole
    # And the other way round: nothing is read, although all is there.
    assert run(running, PROMPT, CONTRAST, BLOCK) == (tokens, 0)
    assert free_blocks(running) == before


def test_slots_of_the_two_passes_are_different(served: tuple[Engine, ExpertReference]) -> None:
    running, _ = served
    fed = len(PROMPT) + 4
    with record_writes(groups(running)) as written:
        run(running, PROMPT, CONTRAST, 5)
    names = sorted(written.keys, key=lambda name: int(name.split(".")[2]))
    assert len(names) == LAYERS
    passes = {
        group: _passes(list(order), 4, chunk=48)
        for group, order in written.order.items()
        if len(order) == 2 * fed
    }
    # A layer with a window may write over slots that have left it.
    assert len(passes) >= (1 if windowed(running) else len(written.order))
    for name in names:
        if groups(running)[name] not in passes:
            continue
        strong, weak = passes[groups(running)[name]]
        assert len(strong) == fed
        # Every layer writes every slot of both passes.
        assert written.keys[name].keys() == {*strong, *weak}
        assert len({*strong, *weak}) == 2 * fed
        for own, other in zip(strong, weak, strict=True):
            same = torch.allclose(written.keys[name][own], written.keys[name][other], atol=1e-3)
            # Both read the same tokens, and through other experts from the second layer on.
            assert same == (name == names[0] or (dense_first(running) and name == names[1]))


def dense_first(running: Engine) -> bool:
    return 0 not in running.runner.expert_answer["shape"]["layers"]


def _passes(slots: list[int], generated: int, chunk: int) -> tuple[list[int], list[int]]:
    """Slots in order of positions: in every step the weak rows follow the strong ones."""
    prompt = len(PROMPT)
    strong: list[int] = []
    weak: list[int] = []
    for size in [*[chunk] * (prompt // chunk), prompt % chunk, *[1] * generated]:
        strong += slots[:size]
        weak += slots[size : 2 * size]
        slots = slots[2 * size :]
    assert not slots
    return strong, weak


def test_many_at_once_never_share_a_block(served: tuple[Engine, ExpertReference]) -> None:
    running, _ = served
    policies = [CONTRAST, None, FAR_CONTRAST, MASK, CONTRAST]
    prompts = [prompt_of(20 + 9 * index, seed=index) for index in range(len(policies))]
    expected = [run(running, p, q, 6)[0] for p, q in zip(prompts, policies, strict=True)]
    assert running.llm.reset_prefix_cache()
    scheduler = running.scheduler
    seen = []
    schedule = scheduler.schedule

    def watched(*args: object, **kwargs: object) -> object:
        output = schedule(*args, **kwargs)
        manager = scheduler.kv_cache_manager
        names = [r.request_id for r in scheduler.running]
        weak = [name + "#weak" for name in names]
        held = [b for name in names + weak for group in manager.get_block_ids(name) for b in group]
        real = [block for block in held if block]
        seen.append(len(real))
        assert len(real) == len(set(real))
        return output

    scheduler.schedule = watched
    try:
        found = running.generate(prompts, policies, 6)
    finally:
        del scheduler.schedule
    assert max(seen) > 10
    assert found == expected


@pytest.mark.parametrize("ends", ["abort", "preempt and keep", "preempt and clear"])
def test_blocks_of_both_passes_come_back(served: tuple[Engine, ExpertReference], ends: str) -> None:
    running, _ = served
    expected, _ = run(running, PROMPT, CONTRAST, 10)
    assert running.llm.reset_prefix_cache()
    before = free_blocks(running)
    if ends != "abort":
        found = running.generate_preempted(
            [PROMPT], [CONTRAST], 10, {1, 4, 7}, keep_cache=ends == "preempt and keep"
        )
        assert found == [expected]
        assert free_blocks(running) == before
        return
    core = running.llm.llm_engine
    (item,), (sampling,) = running._requests([PROMPT], [CONTRAST], 10, None, {})
    for steps in (0, 1, 2, 5):
        name = f"aborted {steps}"
        core.add_request(name, item, sampling)
        for _ in range(steps):
            core.step()
        assert (free_blocks(running) < before) == (steps > 0)
        core.abort_request([name])
        assert free_blocks(running) == before
    assert run(running, PROMPT, CONTRAST, 10)[0] == expected


def test_samples_of_one_request_are_passes_of_their_own(
    served: tuple[Engine, ExpertReference],
) -> None:
    running, _ = served
    before = free_blocks(running)

    def samples(seed: int) -> list[list[int]]:
        # In one chunk: vLLM's CPU runner cannot seed a prompt that takes several.
        output = running.run([PROMPT[:15]], [CONTRAST], 8, temperature=1.5, n=3, seed=seed)[0]
        return [list(sample.token_ids) for sample in output.outputs]

    first = samples(1)
    assert len({tuple(each) for each in first}) == 3
    assert samples(1) == first
    assert free_blocks(running) == before
