"""A K/V cache too small for all requests at once, and prompts that need several steps each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine, engine
from support.expert_policies import CONTRAST, EVERYTHING, MASK, prompt_of
from support.tiny import make_model

from sluice.models.policy.policy import RoutingPolicy
from sluice.models.routing.capabilities import _contrast_refusal

TOKENS = 40
NAMES = [name for name in EVERYTHING if name != "contrast, far"] + ["contrast", "remix, decode"]
POLICIES = [EVERYTHING[name] for name in NAMES]
PROMPTS = [prompt_of(60 + 4 * index, seed=index) for index in range(len(NAMES))]
TIGHT: dict[str, Any] = {
    "max_model_len": 256,
    "num_gpu_blocks_override": 18,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "disable_log_stats": False,
}


def free_blocks(running: Engine) -> int:
    return int(running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@pytest.mark.parametrize(
    ("family", "prefix_caching"),
    [("qwen3_moe", True), ("qwen3_moe", False), ("deepseek_v3", True), ("gpt_oss", True)],
)
def test_scheduler_preempts_and_tokens_stay(
    models_folder: Path, family: str, prefix_caching: bool
) -> None:
    folder = make_model(family, models_folder / f"preemption-{family}")
    with engine(folder, enable_prefix_caching=False) as roomy:
        expected = roomy.generate(PROMPTS, POLICIES, TOKENS)
    flags = {**TIGHT, "enable_prefix_caching": prefix_caching}
    if family == "deepseek_v3":
        # Latent attention has blocks of 16 on a CPU.
        flags["num_gpu_blocks_override"] = 2 * 18
    with engine(folder, **flags) as tight:
        before = free_blocks(tight)
        # Bounded, unlike `generate`: requests that wait for each other would do so for ever.
        found = tight.generate_preempted(PROMPTS, POLICIES, TOKENS, ())
        (preemptions,) = (
            m.value for m in tight.llm.get_metrics() if m.name == "vllm:num_preemptions"
        )
        assert preemptions > 0
        for name, own, wanted in zip(NAMES, found, expected, strict=True):
            assert own == wanted, name
        assert free_blocks(tight) == before
        # What is left of them in the cache serves the next ones.
        assert tight.generate(PROMPTS[7:], POLICIES[7:], TOKENS) == expected[7:]


def steps(running: Engine, asked: list[tuple[list[int], RoutingPolicy, int]], most: int) -> bool:
    """Whether the requests end within so many steps."""
    core = running.llm.llm_engine
    for number, (prompt, policy, tokens) in enumerate(asked):
        (item,), (sampling,) = running._requests([prompt], [policy], tokens, None, {})
        core.add_request(f"long {number}", item, sampling)
    for _ in range(most):
        if not core.has_unfinished_requests():
            return True
        core.step()
    core.abort_request([f"long {number}" for number in range(len(asked))])
    core.step()
    return False


@pytest.mark.parametrize(
    ("family", "longest", "blocks"),
    [
        ("qwen3_moe", 256, 16),
        ("qwen3_moe", 256, 17),
        ("qwen3_moe", 250, 16),
        ("gpt_oss", 256, 17),
        ("gpt_oss", 256, 24),
        ("gpt_oss", 256, 34),
    ],
)
def test_a_longest_contrast_ends_wherever_it_is_offered(
    models_folder: Path, family: str, longest: int, blocks: int
) -> None:
    """A request whose two passes never fit would wait for ever, and everybody behind it."""
    folder = make_model(family, models_folder / f"preemption-{family}")
    flags = {**TIGHT, "max_model_len": longest, "num_gpu_blocks_override": blocks}
    with engine(folder, **flags) as running:
        if _contrast_refusal(running.llm.llm_engine.vllm_config) is not None:
            return  # Refused by name: nobody waits.
        long = prompt_of(longest - 20, seed=1), CONTRAST, 20
        other = prompt_of(20, seed=2), MASK, 4
        assert steps(running, [long, other], 200)
