"""Prefix cache, preemption and chunked prefill under expert controls: nobody sees another's K/V."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine import BLOCK, Engine, engine
from support.expert_policies import (
    CONTRAST,
    DECODE,
    EVERYTHING,
    LAST,
    MASK,
    OEA,
    OTHER_MASK,
    PROMPT_CHANGING,
    TOP_1,
    XSHARE,
    prompt_of,
)
from support.tiny import make_model

from sluice.models.policy.policy import RoutingPolicy

FAMILY = "qwen3_moe"
PROMPT = prompt_of(3 * BLOCK + 5, seed=5)
TOKENS = 8


@pytest.fixture(scope="module")
def folder(models_folder: Path) -> Path:
    return make_model(FAMILY, models_folder / f"expert-isolation-{FAMILY}")


@pytest.fixture(scope="module")
def roomy(folder: Path) -> Iterator[Engine]:
    with engine(folder, enable_prefix_caching=True, max_num_seqs=16) as running:
        yield running


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest) -> None:
    if "roomy" in request.fixturenames:
        assert request.getfixturevalue("roomy").llm.reset_prefix_cache()


def free_blocks(running: Engine) -> int:
    return int(running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def run(
    running: Engine, prompt: list[int], policy: RoutingPolicy | None, tokens: int = TOKENS
) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's came from the prefix cache."""
    output = running.run([prompt], [policy], tokens)[0]
    return list(output.outputs[0].token_ids), int(output.num_cached_tokens)


def cold(
    running: Engine, prompt: list[int], policy: RoutingPolicy | None, tokens: int = TOKENS
) -> list[int]:
    assert running.llm.reset_prefix_cache()
    tokens_of, cached = run(running, prompt, policy, tokens)
    assert cached == 0
    assert running.llm.reset_prefix_cache()
    return tokens_of


def test_policies_give_their_own_tokens_whoever_was_there_before(roomy: Engine) -> None:
    asked = {**EVERYTHING, "oea": OEA, "xshare": XSHARE}
    expected = {name: cold(roomy, PROMPT, policy) for name, policy in asked.items()}
    assert len({tuple(tokens) for tokens in expected.values()}) >= 8, "controls must show"
    names = list(asked)
    for seed in range(2):
        random.Random(seed).shuffle(names)
        for name in names:
            assert run(roomy, PROMPT, asked[name])[0] == expected[name], (name, names)


def test_equal_policies_share_prompts_and_others_do_not(roomy: Engine) -> None:
    for policy in (*PROMPT_CHANGING.values(), OTHER_MASK):
        assert run(roomy, PROMPT, policy, 1)[1] == 0
        assert run(roomy, PROMPT, policy, 1)[1] == 3 * BLOCK
    assert run(roomy, PROMPT, None, 1)[1] == 0
    assert run(roomy, PROMPT, RoutingPolicy(), 1)[1] == 3 * BLOCK


@pytest.mark.parametrize("policy", [DECODE, LAST, OEA, XSHARE], ids=["decode", "last", "oea", "x"])
def test_prompts_of_what_changes_generated_tokens_only_are_stock(
    roomy: Engine, policy: RoutingPolicy
) -> None:
    run(roomy, PROMPT, None, 1)
    assert run(roomy, PROMPT, policy, 1)[1] == 3 * BLOCK
    assert roomy.llm.reset_prefix_cache()
    run(roomy, PROMPT, policy, 1)
    assert run(roomy, PROMPT, None, 1)[1] == 3 * BLOCK


@pytest.mark.parametrize("policy", [DECODE, LAST, OEA, XSHARE], ids=["decode", "last", "oea", "x"])
@pytest.mark.parametrize("reader", ["itself", "stock"])
def test_their_generated_blocks_are_nobodys_prompt(
    roomy: Engine, policy: RoutingPolicy, reader: str
) -> None:
    asks = policy if reader == "itself" else None
    first = cold(roomy, PROMPT, policy, 3 * BLOCK)
    second_turn = [*PROMPT, *first, *prompt_of(7, seed=6)]
    expected = cold(roomy, second_turn, asks)
    assert run(roomy, PROMPT, policy, 3 * BLOCK)[0] == first
    tokens, cached = run(roomy, second_turn, asks)
    assert cached == 3 * BLOCK
    assert tokens == expected


def test_generated_blocks_of_one_policy_for_all_tokens_are_reused(roomy: Engine) -> None:
    first = cold(roomy, PROMPT, MASK, 3 * BLOCK)
    second_turn = [*PROMPT, *first, *prompt_of(7, seed=6)]
    expected = cold(roomy, second_turn, MASK)
    run(roomy, PROMPT, MASK, 3 * BLOCK)
    tokens, cached = run(roomy, second_turn, MASK)
    assert cached == 6 * BLOCK
    assert tokens == expected


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK - 1, 2 * BLOCK])
@pytest.mark.parametrize("policy", [LAST, DECODE], ids=["last", "decode"])
def test_the_block_of_a_remixed_last_prompt_token_is_private(
    roomy: Engine, policy: RoutingPolicy, length: int
) -> None:
    """All before it is stock; it and all behind it are nobody else's, a longer prompt's either."""
    longer = prompt_of(length + BLOCK + 3, seed=7)
    prompt, tokens = longer[:length], BLOCK + 2
    before = (length - 1) // BLOCK * BLOCK
    own = cold(roomy, prompt, policy, tokens)
    continued = [*prompt, *own, 1, 2, 3]
    expected = {
        (name, asks): cold(roomy, other, asks, 4)
        for name, other in (("longer", longer), ("continued", continued))
        for asks in (policy, None)
    }
    run(roomy, longer, None, 1)
    assert run(roomy, prompt, policy, tokens) == (own, before)
    for name, other in (("longer", longer), ("continued", continued)):
        for asks in (policy, None):
            assert roomy.llm.reset_prefix_cache()
            assert run(roomy, prompt, policy, tokens) == (own, 0)
            assert run(roomy, prompt, policy, tokens) == (own, before)
            assert run(roomy, other, asks, 4) == (expected[name, asks], before)


@pytest.mark.parametrize("keep_cache", [True, False])
def test_preempted_policies_keep_their_tokens(roomy: Engine, keep_cache: bool) -> None:
    names = list(EVERYTHING)
    lengths = (20, 31, 32, 33, 50, 64, 5)
    prompts = [prompt_of(lengths[i % 7], seed=20 + i) for i in range(len(names))]
    policies = list(EVERYTHING.values())
    expected = [cold(roomy, p, q, 20) for p, q in zip(prompts, policies, strict=True)]
    before = free_blocks(roomy)
    found = roomy.generate_preempted(prompts, policies, 20, {2, 9, 15}, keep_cache=keep_cache)
    assert dict(zip(names, found, strict=True)) == dict(zip(names, expected, strict=True))
    assert free_blocks(roomy) == before


_alone: dict[tuple[str, int], list[int]] = {}
requests = st.lists(
    st.tuples(st.sampled_from(sorted(EVERYTHING)), st.sampled_from([3, 31, 32, 60])),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(requests, st.sets(st.integers(1, 16), max_size=3), st.booleans())
def test_random_batches_and_preemptions(
    roomy: Engine, drawn: list[tuple[str, int]], preempt_at: set[int], keep_cache: bool
) -> None:
    prompts = [prompt_of(length, seed=length) for _, length in drawn]
    policies = [EVERYTHING[name] for name, _ in drawn]
    for key, prompt, policy in zip(drawn, prompts, policies, strict=True):
        if key not in _alone:
            _alone[key] = cold(roomy, prompt, policy, 12)
    together = roomy.generate_preempted(prompts, policies, 12, preempt_at, keep_cache=keep_cache)
    assert together == [_alone[key] for key in drawn]


def test_what_aborted_requests_held_is_free_again(roomy: Engine) -> None:
    """Each policy is aborted at another step, the rest end; the table of controls is empty too."""
    policies = [*EVERYTHING.values(), OEA, XSHARE]
    prompts = [prompt_of(40, seed=index) for index in range(len(policies))]
    expected = roomy.generate(prompts, [*policies[:-2], None, None], 12)
    before = free_blocks(roomy)
    core = roomy.llm.llm_engine
    names = [f"r{index}" for index in range(len(policies))]
    items, params = roomy._requests(prompts, policies, 12, None, {})
    for name, item, sampling in zip(names, items, params, strict=True):
        core.add_request(name, item, sampling)
    answers, step = {}, 0
    while core.has_unfinished_requests():
        if step < len(names) and step % 3 != 1:
            core.abort_request([names[step]])
        for output in core.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    assert len(answers) < len(names)
    for index, tokens in enumerate(expected[:-2]):
        if index % 3 == 1:
            assert answers[names[index]] == tokens
    assert free_blocks(roomy) == before
    # A worker learns of ended requests with the next step.
    roomy.generate([prompts[0]], [None], 2)
    experts = roomy.runner.routed.batch.experts
    assert not experts._requests
    assert not any(experts._table._row_ids._users[1:])


def test_neighbours_in_one_step_do_not_share_what_they_may_not(roomy: Engine) -> None:
    """The same prompt at once under all policies, some of them twice."""
    policies = [*EVERYTHING.values(), MASK, TOP_1, LAST, CONTRAST]
    expected = [cold(roomy, PROMPT, policy) for policy in policies]
    assert roomy.generate([PROMPT] * len(policies), policies, TOKENS) == expected
