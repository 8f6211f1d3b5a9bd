"""Every family against transformers with the same sub-layers silenced; real engine, fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.engine import Engine, engine
from support.reference import Reference
from support.tiny import FAMILIES, LAYERS, VOCABULARY, make_model

from sluice.models.engine.startup import traced_sublayers
from sluice.models.engine.sublayers.compiled import Compiler
from sluice.models.engine.sublayers.graphs import examples, join
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.vllm_adapter.families import FAMILIES as DESCRIBED
from sluice.models.vllm_adapter.families import depth_refusal

TOKENS = 10


def random_skip(rng: random.Random, phase: Phase) -> SkipSet:
    def some() -> tuple[int, ...]:
        return tuple(rng.sample(range(LAYERS), rng.randrange(LAYERS)))

    return SkipSet.of(blocks=some()[:2], attention=some(), mlp=some(), phase=phase)


def random_prompt(rng: random.Random, low: int = 3, high: int = 50) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randrange(low, high))]


VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in FAMILIES},
    # Every prompt and answer outgrows the window.
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def served(
    request: pytest.FixtureRequest, models_folder: Path
) -> Iterator[tuple[Engine, Reference]]:
    family, changes = VARIANTS[request.param]
    folder = make_model(family, models_folder / request.param, **changes)
    with engine(folder) as running:
        yield running, Reference(folder)


def test_every_described_family_is_tested() -> None:
    assert {family.name for family in DESCRIBED} == set(FAMILIES)


@pytest.mark.parametrize("phase", list(Phase))
def test_random_masks_equal_the_reference(served: tuple[Engine, Reference], phase: Phase) -> None:
    running, reference = served
    rng = random.Random(f"{phase}")
    prompts = [random_prompt(rng) for _ in range(5)]
    skips = [
        SkipSet.of(attention=(rng.randrange(LAYERS),), phase=phase),
        SkipSet.of(mlp=(rng.randrange(LAYERS),), phase=phase),
        SkipSet.of(blocks=(rng.randrange(LAYERS),), phase=phase),
        random_skip(rng, phase),
        random_skip(rng, phase),
    ]
    expected = [
        reference.greedy(prompt, skip, TOKENS) for prompt, skip in zip(prompts, skips, strict=True)
    ]
    alone = [
        running.generate([prompt], [skip], TOKENS)[0]
        for prompt, skip in zip(prompts, skips, strict=True)
    ]
    together = running.generate([*prompts, prompts[0]], [*skips, None], TOKENS)
    assert alone == expected
    assert together[:-1] == expected
    assert together[-1] == reference.greedy(prompts[0], SkipSet(), TOKENS)


class Interpreter(Compiler):
    """Runs joined graphs as they are, without Inductor."""

    def _compile(self, kinds: Sequence[Any], owned: Sequence[Any]) -> Any:
        return join(kinds)


def test_traced_and_joined_parts_equal_the_reference(
    served: tuple[Engine, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled where vLLM compiles the model; `test_compiled_depth.py` compiles it too."""
    running, reference = served
    runner, stack = running.runner, running.runner.routed.stack
    width = runner.model_config.get_hidden_size()
    arguments = examples(width, torch.float32, runner.device)
    interpreter = Interpreter({}, arguments)
    traced = traced_sublayers(stack, runner.vllm_config, interpreter)
    monkeypatch.setattr(runner.routed.loop, "_sublayers", traced)
    # DeepSeek's first layer is dense.
    assert len(interpreter) <= 9
    rng = random.Random(3)
    prompts = [random_prompt(rng) for _ in range(4)]
    skips = [random_skip(rng, phase) for phase in (Phase.BOTH, Phase.DECODE, Phase.PREFILL)]
    expected = [
        reference.greedy(prompt, skip, TOKENS)
        for prompt, skip in zip(prompts, [*skips, SkipSet()], strict=True)
    ]
    assert running.generate(prompts, [*skips, None], TOKENS) == expected


def test_a_skip_changes_tokens(served: tuple[Engine, Reference]) -> None:
    """Guards the tests above: a mask that is not applied must be visible."""
    running, _ = served
    prompt = random_prompt(random.Random(1), 20, 21)
    full = running.generate([prompt], [None], TOKENS)[0]
    skips = [SkipSet.of(attention=(2,)), SkipSet.of(mlp=(3,)), SkipSet.of(blocks=(4,))]
    for routed in running.generate([prompt] * 3, skips, TOKENS):
        assert routed != full


def test_compute_is_weighed_by_active_parameters(served: tuple[Engine, Reference]) -> None:
    """Attention, and the router with the chosen share of the experts, counted in transformers."""
    running, reference = served
    config = reference.model.config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 1)
    share = getattr(config, "num_experts_per_tok", None) or experts

    def active(module: torch.nn.Module) -> float:
        named = module.named_parameters()
        weights = [p for name, p in named if p.dim() > 1 and not name.endswith("bias")]
        return sum(p.numel() * (share / experts if p.dim() == 3 else 1) for p in weights)

    expected = [
        (active(layer.self_attn), active(layer.mlp)) for layer in reference.model.model.layers
    ]
    cost = running.runner.routed.cost
    assert np.array_equal(cost.modules, np.array(expected)), (cost.modules, expected)
    stacked = [p for p in reference.model.model.layers[-1].parameters() if p.dim() == 3]
    assert cost.expert == sum(p[0].numel() for p in stacked)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hf_text_config": SimpleNamespace(index_topk=2048)}, "index_topk"),
        ({"hf_text_config": SimpleNamespace(llama_4_scaling={"beta": 0.1})}, "llama_4_scaling"),
        ({"use_mla": False}, "latent"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_deepseek_is_refused_where_the_loop_would_run_it_otherwise(
    architecture: str, changes: dict[str, object], named: str
) -> None:
    model = SimpleNamespace(
        **{
            "hf_text_config": SimpleNamespace(),
            "use_mla": True,
            "dtype": torch.bfloat16,
            **changes,
        },
        architecture=architecture,
    )
    reason = depth_refusal(SimpleNamespace(model_config=model))
    assert reason is not None
    assert named in reason
