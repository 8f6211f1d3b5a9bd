"""Adapters of skip sets on a real engine against the plain reference, fp32, K/V poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from support.engine import Engine, engine
from support.interpreter import v2
from support.planning import KEEP_ALL, on_static_buffers, plan_by
from support.profiles import write_profile
from support.reference import Reference, Run
from support.tiny import VOCABULARY, make_model
from torch import Tensor

from sluice.models.engine.plan import LayerPlanner, compact
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.profile.profile import PROFILE_ENV

TOKENS = 24
RANK = 3
PROMPT = [(37 * i * i + 11 * i + 5) % VOCABULARY for i in range(45)]
SETS = {
    "decode": SkipSet.of(blocks=(1, 2, 4), phase=Phase.DECODE, adapter="decode"),
    "both": SkipSet.of(blocks=(2,), attention=(4,), adapter="both"),
    "prefill": SkipSet.of(mlp=(3,), phase=Phase.PREFILL, adapter="prefill"),
}
AFTER = {"decode": (2, 4), "both": (2, 4), "prefill": (3,)}
NOTHING = {"value": 0.5, "low": 0.4, "high": 0.6}


def adapters_of(name: str, hidden: int) -> dict[int, tuple[Tensor, Tensor]]:
    """`down` and `up` by layer, large enough to turn tokens."""
    generator = torch.Generator().manual_seed(len(name))
    return {
        layer: (
            torch.randn(RANK, hidden, generator=generator) / 4,
            torch.randn(hidden, RANK, generator=generator) / 4,
        )
        for layer in AFTER[name]
    }


def fields_of(name: str) -> dict[str, object]:
    skip = SETS[name]
    return {
        "attention": skip.attention,
        "mlp": skip.mlp,
        "phase": skip.phase,
        "layers": AFTER[name],
        "rank": RANK,
        "prompts": 8,
        "held_out": 8,
        "before": NOTHING,
        "after": NOTHING,
        "divergence_before": 1.0,
        "divergence_after": 0.5,
    }


@dataclass
class Served:
    engine: Engine
    reference: Reference

    def __post_init__(self) -> None:
        self.expected = cache(self._expected)

    def _expected(self, name: str, length: int = len(PROMPT), *, adapted: bool = True) -> Run:
        adapters = adapters_of(name, self.reference.model.config.hidden_size) if adapted else {}
        policy = RoutingPolicy(SETS[name])
        return self.reference.run(PROMPT[:length], policy, TOKENS, adapters=adapters)


FAMILIES = ("llama",) if v2() else ("llama", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, models_folder: Path) -> Iterator[Served]:
    folder = make_model(request.param, models_folder / f"adapters-{request.param}")
    reference = Reference(folder)
    heads = {
        f"adapter.{name}.{layer}.{tensor}": value
        for name in SETS
        for layer, pair in adapters_of(name, reference.model.config.hidden_size).items()
        for tensor, value in zip(("down", "up"), pair, strict=True)
    }
    profile = models_folder / f"adapters-{request.param}-profile"
    write_profile(profile, reference, heads, adapters={name: fields_of(name) for name in SETS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROFILE_ENV, str(profile))
        with engine(folder, max_num_batched_tokens=64) as running:
            yield Served(running, reference)


@pytest.mark.parametrize("name", SETS)
def test_equals_the_reference(served: Served, name: str) -> None:
    assert served.engine.llm.reset_prefix_cache()
    run = served.expected(name)
    assert served.engine.generate([PROMPT], [SETS[name]], TOKENS) == [run.tokens], run.margin
    assert run.tokens != served.expected(name, adapted=False).tokens, "the adapter must matter"


@pytest.mark.parametrize("name", SETS)
def test_equals_the_reference_on_static_buffers(
    served: Served, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps as on CUDA."""
    assert served.engine.llm.reset_prefix_cache()
    steps = on_static_buffers(served.engine, monkeypatch)
    run = served.expected(name)
    assert served.engine.generate([PROMPT], [SETS[name]], TOKENS) == [run.tokens], run.margin
    # Without a generated token that skips, vLLM's own forward decodes.
    assert bool(steps) == (name != "prefill")


@pytest.mark.parametrize("plan_layers", [None, compact, KEEP_ALL])
def test_neighbours_do_not_matter(
    served: Served, monkeypatch: pytest.MonkeyPatch, plan_layers: LayerPlanner | None
) -> None:
    """All sets in one batch, with a neighbour that skips the same without an adapter and a stock
    one; prompts of different lengths, of which 64 tokens at a time are read.
    """
    if plan_layers is not None:
        plan_by(served.engine, monkeypatch, plan_layers)
    assert served.engine.llm.reset_prefix_cache()
    bare = SkipSet.of(blocks=(1, 2, 4), phase=Phase.DECODE)
    lengths = [45, 31, 38, 27, 45]
    policies = [*SETS.values(), bare, None]
    expected = [
        *(
            served.expected(name, length).tokens
            for name, length in zip(SETS, lengths, strict=False)
        ),
        served.expected("decode", lengths[3], adapted=False).tokens,
        served.reference.greedy(PROMPT, SkipSet(), TOKENS),
    ]
    prompts = [PROMPT[:length] for length in lengths]
    assert served.engine.generate(prompts, policies, TOKENS) == expected
    again = served.engine.generate_preempted(prompts, policies, TOKENS, {3, 12})
    assert again == expected


def test_two_requests_of_one_adapter_share_a_step(served: Served) -> None:
    assert served.engine.llm.reset_prefix_cache()
    prompts, name = [PROMPT[:20], PROMPT[:33]], "both"
    expected = [served.expected(name, len(prompt)).tokens for prompt in prompts]
    assert served.engine.generate(prompts, [SETS[name]] * 2, TOKENS) == expected
