"""Random policies in random batches, and random preemptions: every request keeps its tokens.

What a request gives alone is held against the reference in `test_depth_methods`; here the engine
is held against itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engine import Engine, engine
from support.profiles import write_profile
from support.reference import Reference
from support.references.choices import random_heads, threshold_between
from support.tiny import LAYERS, VOCABULARY, make_model

from sluice.models.depth.registry import token_exits
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)
from sluice.models.profile.profile import PROFILE_ENV

TOKENS = 16
ALL_EXITS = tuple(range(LAYERS - 1))
PROMPTS = [
    tuple((37 * i * i + 11 * i + 5 + 13 * seed) % VOCABULARY for i in range(length))
    for seed, length in enumerate((3, 18, 31, 32, 33, 60))
]

layer_sets = st.lists(st.integers(0, LAYERS - 1), max_size=3).map(tuple)
skips = st.builds(SkipSet.of, attention=layer_sets, mlp=layer_sets, phase=st.sampled_from(Phase))


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def served(
    request: pytest.FixtureRequest, models_folder: Path
) -> Iterator[tuple[Engine, dict[str, float]]]:
    folder = make_model(request.param, models_folder / f"properties-{request.param}")
    reference = Reference(folder)
    heads = random_heads(reference.states(PROMPTS[-1]))
    profile = write_profile(models_folder / f"properties-{request.param}-p", reference, heads)
    thresholds = {"patience": 0.0}
    for method in token_exits():
        if method != "patience":
            share = 0.15 if method == "entropy" else 0.85
            scores = reference.scores(PROMPTS[-1], method, ALL_EXITS, TOKENS, heads)
            thresholds[method] = threshold_between(scores, share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROFILE_ENV, str(profile))
        with engine(folder, max_num_batched_tokens=64, max_num_seqs=8) as running:
            yield running, thresholds


@st.composite
def policies(draw: st.DrawFn) -> tuple[str, RoutingPolicy]:
    """A policy, and the exit method whose threshold it still lacks."""
    kind = draw(st.sampled_from(["stock", "skip", "exit", "exit", "exit", "adaptive"]))
    if kind == "stock":
        return "", RoutingPolicy()
    if kind == "skip":
        return "", RoutingPolicy(draw(skips))
    if kind == "adaptive":
        rule = draw(
            st.sampled_from(
                [
                    AdaptiveRule("first", threshold=0.5),
                    AdaptiveRule("similarity", budget=0.6),
                    AdaptiveRule("lac", mode="predict", threshold=0.6),
                    AdaptiveRule("lac", mode="readout", threshold=0.6),
                    AdaptiveRule("lac", mode="replace", threshold=0.6),
                    AdaptiveRule("mod"),
                ]
            )
        )
        return "", RoutingPolicy(adaptive=rule)
    method = draw(st.sampled_from(sorted(token_exits())))
    layers = draw(st.sets(st.sampled_from(ALL_EXITS), min_size=1).map(lambda s: tuple(sorted(s))))
    kv = draw(st.sampled_from(MissingKV))
    patience = 1 if method == "patience" else None
    skip = draw(skips) if kv is MissingKV.PROPAGATE and draw(st.booleans()) else SkipSet()
    rule = ExitRule(method, layers, patience=patience, kv=kv)
    return method, RoutingPolicy(skip, exit=rule)


def with_threshold(drawn: tuple[str, RoutingPolicy], thresholds: dict[str, float]) -> RoutingPolicy:
    method, policy = drawn
    if not method or policy.exit is None or method == "patience":
        return policy
    wire = policy.to_dict()
    wire["depth"]["exit"]["threshold"] = thresholds[method]
    return RoutingPolicy.from_dict(wire)


requests = st.lists(st.tuples(policies(), st.sampled_from(PROMPTS)), min_size=2, max_size=8)


@cache
def alone(running: Engine, prompt: tuple[int, ...], policy: RoutingPolicy) -> list[int]:
    assert running.llm.reset_prefix_cache()
    return running.generate([prompt], [policy], TOKENS)[0]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests, st.sets(st.integers(1, TOKENS + 4), max_size=3), st.booleans())
def test_batches_and_preemptions_change_nothing(
    served: tuple[Engine, dict[str, float]],
    drawn: list[tuple[tuple[str, RoutingPolicy], tuple[int, ...]]],
    preempt_at: set[int],
    keep_cache: bool,
) -> None:
    running, thresholds = served
    chosen = [with_threshold(policy, thresholds) for policy, _ in drawn]
    prompts = [prompt for _, prompt in drawn]
    expected = [
        alone(running, prompt, policy) for prompt, policy in zip(prompts, chosen, strict=True)
    ]
    together = running.generate_preempted(
        prompts, chosen, TOKENS, preempt_at, keep_cache=keep_cache
    )
    assert together == expected
