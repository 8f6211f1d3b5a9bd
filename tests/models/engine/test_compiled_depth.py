"""With compilation on, the loop runs compiled parts of layers: same tokens as the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine, engine
from support.reference import Reference
from support.tiny import LAYERS, VOCABULARY, make_model

from sluice.models.engine.startup import SEGMENTS_ENV, build_sublayers
from sluice.models.engine.sublayers import functions, sublayers
from sluice.models.engine.sublayers.compiled import Launch
from sluice.models.policy.policy import ExitRule, MissingKV, Phase, RoutingPolicy, SkipSet

TOKENS = 10
EXIT = ExitRule("confidence", (1, 3), threshold=0.0, kv=MissingKV.PROPAGATE)
POLICIES = {
    "attention": RoutingPolicy(SkipSet.of(attention=(1, 2))),
    "MLP": RoutingPolicy(SkipSet.of(mlp=(0, 3))),
    "blocks": RoutingPolicy(SkipSet.of(blocks=(1, 3))),
    "both and none": RoutingPolicy(SkipSet.of(blocks=(2,), attention=(0,), mlp=(3,))),
    "generated tokens only": RoutingPolicy(SkipSet.of(blocks=(2,), phase=Phase.DECODE)),
    "prompt only": RoutingPolicy(SkipSet.of(blocks=(2,), phase=Phase.PREFILL)),
    "leave, K/V filled": RoutingPolicy(exit=EXIT),
    "leave, K/V later": RoutingPolicy(
        exit=ExitRule("confidence", (2,), threshold=0.0, kv=MissingKV.RECOMPUTE)
    ),
    "some leave": RoutingPolicy(exit=ExitRule("patience", (0, 1, 2, 3), patience=1)),
    "no routing": None,
}


@pytest.fixture(scope="module")
def folder(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "depth-compiled")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_POISON_KV", "1")
        with engine(folder, enforce_eager=False) as compiled:
            yield compiled


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def prompts() -> list[list[int]]:
    rng = random.Random(16)
    lengths = [3 + 5 * index for index in range(len(POLICIES))]
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.fixture
def no_plain_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plain loop calls must not be called."""

    def called(*_arguments: Any) -> None:
        raise AssertionError("a part ran uncompiled")

    monkeypatch.setattr(sublayers, "attend", called)
    monkeypatch.setattr(sublayers, "run_mlp", called)
    monkeypatch.setattr(functions, "fill_keys_values", called)


@pytest.mark.usefixtures("no_plain_parts")
def test_tokens_are_those_of_the_reference(running: Engine, reference: Reference) -> None:
    """Alone and side by side, over K/V that are NaN until they are written."""
    expected = [
        reference.run(prompt, policy or RoutingPolicy(), TOKENS).tokens
        for prompt, policy in zip(prompts(), POLICIES.values(), strict=True)
    ]
    together = running.generate(prompts(), list(POLICIES.values()), TOKENS)
    assert dict(zip(POLICIES, together, strict=True)) == dict(zip(POLICIES, expected, strict=True))
    alone = [
        running.generate([prompt], [policy], TOKENS)[0]
        for prompt, policy in zip(prompts(), POLICIES.values(), strict=True)
    ]
    assert dict(zip(POLICIES, alone, strict=True)) == dict(zip(POLICIES, expected, strict=True))
    assert len({tuple(tokens) for tokens in expected}) > len(POLICIES) / 2


def test_all_layers_share_what_was_compiled(running: Engine) -> None:
    parts = running.runner.routed.loop._sublayers
    for launches in (parts.attend, parts.run_mlp, parts.block, parts.fill):
        assert len(launches) == LAYERS
        assert len({launch.compiled for launch in launches}) == 1


def test_they_can_be_switched_off(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEGMENTS_ENV, "off")
    runner = running.runner
    plain = build_sublayers(runner.routed.stack, runner.vllm_config, runner.device)
    assert not any(isinstance(part, Launch) for part in (*plain.block, *plain.fill))
