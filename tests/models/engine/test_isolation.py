"""Neighbours, prefix cache, chunked prefill and preemption leave a request's tokens alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.engine import BLOCK, Engine, engine
from support.planning import on_static_buffers, planned_to_stay
from support.reference import Reference
from support.tiny import LAYERS, VOCABULARY, make_model
from support.written import record_writes

from sluice.models.engine.plan import compact
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)

FULL = SkipSet()
ATTENTION_OUT = SkipSet.of(attention=(1, 3))
BLOCKS_OUT = SkipSet.of(blocks=(2, 4))
DECODE_OUT = SkipSet.of(blocks=(2, 3), phase=Phase.DECODE)
PREFILL_OUT = SkipSet.of(attention=(0, 2), mlp=(1,), phase=Phase.PREFILL)
POLICIES = [FULL, ATTENTION_OUT, BLOCKS_OUT, DECODE_OUT, PREFILL_OUT]


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(family: str, models_folder: Path) -> Reference:
    return Reference(make_model(family, models_folder / f"isolation-{family}"))


@pytest.fixture(scope="module")
def roomy(family: str, reference: Reference, models_folder: Path) -> Iterator[Engine]:
    with engine(models_folder / f"isolation-{family}", enable_prefix_caching=True) as running:
        yield running


class TestPrefixCache:
    PROMPT = prompt_of(3 * BLOCK + 5, seed=5)

    @pytest.fixture(autouse=True)
    def _cold(self, roomy: Engine) -> None:
        assert roomy.llm.reset_prefix_cache()

    def test_each_policy_equals_its_cold_run(self, roomy: Engine, reference: Reference) -> None:
        expected = [reference.greedy(self.PROMPT, skip, 8) for skip in POLICIES]
        for _ in range(2):
            for skip, tokens in zip(POLICIES, expected, strict=True):
                assert roomy.generate([self.PROMPT], [skip], 8)[0] == tokens

    def test_equal_policies_share_blocks_and_different_ones_do_not(self, roomy: Engine) -> None:
        def cached(skip: SkipSet | None) -> int:
            return int(roomy.run([self.PROMPT], [skip], 1)[0].num_cached_tokens)

        assert cached(BLOCKS_OUT) == 0
        assert cached(BLOCKS_OUT) == 3 * BLOCK
        assert cached(ATTENTION_OUT) == 0
        assert cached(None) == 0
        assert cached(PREFILL_OUT) == 0

    def test_a_decode_only_policy_shares_the_prompt_with_stock_requests(
        self, roomy: Engine
    ) -> None:
        roomy.run([self.PROMPT], [None], 1)
        assert roomy.run([self.PROMPT], [DECODE_OUT], 1)[0].num_cached_tokens == 3 * BLOCK

    @pytest.mark.parametrize("skip", [DECODE_OUT, PREFILL_OUT])
    def test_generated_blocks_of_a_phase_split_are_nobodys_prompt(
        self, roomy: Engine, reference: Reference, skip: SkipSet
    ) -> None:
        """What decode left out must not come back as the prompt of the next turn."""
        first = roomy.generate([self.PROMPT], [skip], 3 * BLOCK)[0]
        second_turn = [*self.PROMPT, *first, *prompt_of(7, seed=6)]
        expected = reference.greedy(second_turn, skip, 6)
        output = roomy.run([second_turn], [skip], 6)[0]
        assert output.outputs[0].token_ids == expected
        assert output.num_cached_tokens <= len(self.PROMPT)

    def test_generated_blocks_of_a_uniform_policy_are_reused(
        self, roomy: Engine, reference: Reference
    ) -> None:
        first = roomy.generate([self.PROMPT], [BLOCKS_OUT], 3 * BLOCK)[0]
        second_turn = [*self.PROMPT, *first, *prompt_of(7, seed=6)]
        output = roomy.run([second_turn], [BLOCKS_OUT], 6)[0]
        assert output.outputs[0].token_ids == reference.greedy(second_turn, BLOCKS_OUT, 6)
        assert output.num_cached_tokens > len(self.PROMPT)


def leaving(kv: MissingKV) -> RoutingPolicy:
    """Every token leaves after layer 2."""
    return RoutingPolicy(exit=ExitRule("confidence", (2,), threshold=0.0, kv=kv))


class TestPrefixCacheAndExits:
    PROMPT = prompt_of(2 * BLOCK + 5, seed=9)

    @pytest.fixture(autouse=True)
    def _cold(self, roomy: Engine) -> None:
        assert roomy.llm.reset_prefix_cache()

    def test_prompts_are_shared_and_propagated_blocks_are_not(
        self, roomy: Engine, reference: Reference
    ) -> None:
        policy = leaving(MissingKV.PROPAGATE)
        roomy.run([self.PROMPT], [None], 1)
        first = roomy.run([self.PROMPT], [policy], 2 * BLOCK)[0]
        assert first.num_cached_tokens == 2 * BLOCK
        second_turn = [*self.PROMPT, *first.outputs[0].token_ids, 1, 2, 3]
        output = roomy.run([second_turn], [None], 6)[0]
        assert output.num_cached_tokens == 2 * BLOCK
        assert output.outputs[0].token_ids == reference.greedy(second_turn, FULL, 6)

    def test_recomputed_blocks_are_full_depth_and_serve_anybody(
        self, roomy: Engine, reference: Reference
    ) -> None:
        policy = leaving(MissingKV.RECOMPUTE)
        first = roomy.run([self.PROMPT], [policy], 2 * BLOCK)[0]
        second_turn = [*self.PROMPT, *first.outputs[0].token_ids, 1, 2, 3]
        output = roomy.run([second_turn], [None], 6)[0]
        assert output.num_cached_tokens == 4 * BLOCK
        assert output.outputs[0].token_ids == reference.greedy(second_turn, FULL, 6)

    def test_masks_pooled_over_the_prompt_do_not_depend_on_the_cache(
        self, roomy: Engine, reference: Reference
    ) -> None:
        policy = RoutingPolicy(adaptive=AdaptiveRule("similarity", budget=0.5))
        expected = reference.run(self.PROMPT, policy, 8).tokens
        for _ in range(2):
            output = roomy.run([self.PROMPT], [policy], 8)[0]
            assert output.num_cached_tokens == 0
            assert output.outputs[0].token_ids == expected
        assert roomy.run([self.PROMPT], [None], 1)[0].num_cached_tokens == 2 * BLOCK

    def test_a_prompt_under_token_capacity_is_nobody_elses(
        self, roomy: Engine, reference: Reference
    ) -> None:
        policy = RoutingPolicy(adaptive=AdaptiveRule("mod"))
        longer = [*self.PROMPT, *prompt_of(BLOCK, seed=10)]
        for prompt in (self.PROMPT, longer, self.PROMPT):
            output = roomy.run([prompt], [policy], 6)[0]
            assert output.num_cached_tokens == 0
            assert output.outputs[0].token_ids == reference.run(prompt, policy, 6).tokens


def test_unwritten_slots_are_never_read(
    roomy: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New blocks hold NaN keys (`SLUICE_POISON_KV`); attending to one shows in the tokens."""
    assert roomy.llm.reset_prefix_cache()
    prompts = [prompt_of(40 + index, seed=index) for index in range(len(POLICIES))]
    expected = [reference.greedy(p, skip, 8) for p, skip in zip(prompts, POLICIES, strict=True)]
    assert roomy.generate(prompts, POLICIES, 8) == expected
    assert all(bool(torch.isnan(cache).any()) for cache in roomy.runner.kv_caches)
    # The net itself: K/V that nobody writes must be noticed.
    monkeypatch.setattr(
        "sluice.models.engine.sublayers.functions.fill_keys_values", lambda *_: None
    )
    monkeypatch.setattr(roomy.runner.routed.loop, "_plan_layers", compact)
    assert roomy.llm.reset_prefix_cache()
    left = POLICIES.index(PREFILL_OUT)
    assert roomy.generate([prompts[left]], [PREFILL_OUT], 8)[0] != expected[left]


@pytest.mark.parametrize("stays", [planned_to_stay, on_static_buffers])
def test_a_row_that_stays_in_a_layer_that_it_skips_writes_nothing_there(
    roomy: Engine,
    monkeypatch: pytest.MonkeyPatch,
    stays: Callable[[Engine, pytest.MonkeyPatch], object],
) -> None:
    """`phase: both` leaves its prompt out too."""
    stays(roomy, monkeypatch)
    assert roomy.llm.reset_prefix_cache()
    lengths, tokens, skipped = (9, 11), 5, 2
    prompts = [prompt_of(length, seed=length) for length in lengths]
    names = [layer.kv_name for layer in roomy.runner.routed.stack.layers]
    with record_writes() as written:
        roomy.generate(prompts, [SkipSet.of(blocks=(skipped,)), None], tokens)
    slots = [set(written.keys[name]) for name in names]
    assert -1 in slots[skipped]
    assert all(-1 not in each for each in slots[:skipped])
    # The last token of an answer is not fed back.
    assert len(slots[0]) - len(slots[skipped] - {-1}) >= lengths[0] + tokens - 1


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_and_chunked_prefill(
    family: str, reference: Reference, models_folder: Path, prefix_caching: bool
) -> None:
    """Blocks for about half of the requests, and prompts that need several steps each."""
    with engine(
        models_folder / f"isolation-{family}",
        enable_prefix_caching=prefix_caching,
        max_model_len=256,
        num_gpu_blocks_override=14,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        disable_log_stats=False,
    ) as tight:
        skips = [*POLICIES, SkipSet.of(mlp=tuple(range(1, LAYERS)), phase=Phase.DECODE)]
        prompts = [prompt_of(60 + 5 * index, seed=index) for index in range(len(skips))]
        together = tight.generate(prompts, skips, 40)
        preemptions = next(
            metric.value
            for metric in tight.llm.get_metrics()
            if metric.name == "vllm:num_preemptions"
        )
        assert preemptions > 0
        for prompt, skip, tokens in zip(prompts, skips, together, strict=True):
            assert tokens == reference.greedy(prompt, skip, 40)
