"""Every depth method on a real engine against the plain reference, fp32, K/V poisoned.

Tokens, exit layers, decided masks and the K/V of every slot that is attended; each request alone,
and all of them in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine import Engine, engine
from support.planning import KEEP_ALL, on_static_buffers, plan_by
from support.profiles import write_profile
from support.reference import Reference, Run
from support.references.choices import random_heads, threshold_between
from support.tiny import LAYERS, VOCABULARY, make_model
from support.written import assert_same_kv, in_pairs, record_writes

from sluice.kernels.dispatch import AUTO
from sluice.models.depth.registry import adaptive_methods, token_exits
from sluice.models.engine.plan import LayerPlanner, compact
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)
from sluice.models.profile.profile import PROFILE_ENV

TOKENS = 24
LONG = 48
EXITS = tuple(range(LAYERS - 1))
# Ends inside the second block; the answer crosses into the third.
PROMPT = [(37 * i * i + 11 * i + 5) % VOCABULARY for i in range(45)]


class Expected:
    """What every engine of a family is held against, worked out once for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = Reference(folder)
        self.heads = random_heads(self.reference.states(PROMPT))
        self.run = cache(self._run)
        self.scores = cache(self._scores)

    def _run(self, length: int, policy: RoutingPolicy, block: int) -> Run:
        prompt = PROMPT[:length]
        return self.reference.run(prompt, policy, TOKENS, self.heads, block_size=block)

    def _scores(self, method: str, layers: tuple[int, ...]) -> list[float]:
        return self.reference.scores(PROMPT, method, layers, TOKENS, self.heads)


@dataclass
class Served:
    engine: Engine
    expected: Expected

    def run(self, policy: RoutingPolicy, length: int = len(PROMPT)) -> Run:
        """The reference's run of the prompt's first tokens."""
        return self.expected.run(length, policy, self.block)

    @property
    def block(self) -> int:
        """Tokens of a K/V block; vLLM has its own idea for some attentions."""
        return self.engine.runner.cache_config.block_size

    def rule(
        self, method: str, layers: tuple[int, ...] = EXITS, share: float = 0.9, **changes: object
    ) -> ExitRule:
        """A rule under which some tokens leave and some stay."""
        if method == "patience":
            return ExitRule(method, layers, patience=1, **changes)
        share = 1.0 - share if method == "entropy" else share
        scores = self.expected.scores(method, layers)
        return ExitRule(method, layers, threshold=threshold_between(scores, share), **changes)

    def prompt_threshold(self, method: str) -> float:
        scores = self.expected.reference.prompt_scores(PROMPT, method, self.expected.heads)
        return threshold_between(scores, 0.5)

    def policy(self, case: str) -> RoutingPolicy:
        name, _, variant = case.partition(" ")
        if name in token_exits():
            if variant == "decay":
                return RoutingPolicy(exit=self.rule(name, decay=4.0))
            if variant == "sparse":
                return RoutingPolicy(exit=self.rule(name, (1, 3), 0.8))
            if variant == "skip":
                skip = SkipSet.of(attention=(2,), mlp=(1, 4), phase=Phase.BOTH)
                return RoutingPolicy(skip, exit=self.rule(name, (3,), 0.3))
            return RoutingPolicy(exit=self.rule(name, kv=MissingKV(variant or "propagate")))
        match case:
            case "first":
                return RoutingPolicy(adaptive=AdaptiveRule("first", threshold=0.5))
            case "similarity threshold":
                threshold = self.prompt_threshold("similarity")
                return RoutingPolicy(adaptive=AdaptiveRule("similarity", threshold=threshold))
            case "similarity budget":
                return RoutingPolicy(adaptive=AdaptiveRule("similarity", budget=0.5))
            case "mod cosine":
                return RoutingPolicy(adaptive=AdaptiveRule("mod"))
            case "mod list":
                retention = (1.0, 0.3, 0.9, 0.5, 0.01, 0.6)
                return RoutingPolicy(adaptive=AdaptiveRule("mod", retention=retention))
            case "elastic":
                skip = SkipSet.of(blocks=(2, 4), phase=Phase.DECODE, elastic=True)
                return RoutingPolicy(skip)
            case "elastic both":
                return RoutingPolicy(SkipSet.of(blocks=(2, 4), elastic=True))
        assert name == "lac"
        threshold = self.prompt_threshold("lac") if variant == "predict" else 0.6
        return RoutingPolicy(adaptive=AdaptiveRule("lac", mode=variant, threshold=threshold))


CASES = [
    *(f"{name} {kv}" for name in token_exits() for kv in MissingKV),
    "confidence sparse",
    "saturation skip",
    "saturation decay",
    "classifier decay",
    "first",
    "lac readout",
    "lac replace",
    "lac predict",
    "similarity threshold",
    "similarity budget",
    "mod cosine",
    "mod list",
    "elastic",
    "elastic both",
]


OPERATIONS = {
    "confidence": {"exit_decision"},
    "entropy": {"exit_decision"},
    "saturation": {"layer_stats"},
    "lac": {"layer_stats"},
    "similarity": {"layer_stats"},
    "mod": {"layer_stats"},
}
"""What methods decide by; the others decide without an operation."""


def operations(case: str) -> set[str]:
    """What must run, beside the counts of experts."""
    name, _, variant = case.partition(" ")
    moved = {"row_compact", "row_scatter"} if variant == MissingKV.RECOMPUTE else set()
    return OPERATIONS.get(name, set()) | moved


SERVED = ("llama", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
CHOSEN = ("llama", "qwen3_moe", "deepseek_v3")
"""A dense model, one with softmax routing, one with groups, sigmoid and latent attention."""


@pytest.fixture(scope="module")
def expected_of(models_folder: Path) -> Callable[[str], Expected]:
    return cache(lambda family: Expected(make_model(family, models_folder / f"depth-{family}")))


@pytest.fixture(scope="module")
def served(
    family: str, kernels: str, expected_of: Callable[[str], Expected], models_folder: Path
) -> Iterator[Served]:
    expected = expected_of(family)
    profile = models_folder / f"profile-{family}-{kernels}"
    write_profile(profile, expected.reference, expected.heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROFILE_ENV, str(profile))
        with engine(expected.folder) as running:
            yield Served(running, expected)


def test_every_method_is_tested() -> None:
    tested = {case.split()[0] for case in CASES}
    assert tested == {*token_exits(), *adaptive_methods(), "elastic"}


# What reaches no operation is the same under every choice.
INTERPRETED = [
    pytest.param(case, marks=pytest.mark.interpreted) if operations(case) else case
    for case in CASES
]


@pytest.mark.parametrize("case", INTERPRETED)
def test_equals_the_reference(served: Served, case: str, ran: set[str]) -> None:
    _check(served, case)
    assert ran >= operations(case)


@pytest.mark.family("llama")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_on_static_buffers(
    served: Served, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps as on CUDA; those with tokens that wait for their upper layers are gathered."""
    steps = on_static_buffers(served.engine, monkeypatch)
    _check(served, case)
    # Mixture of depths masks prompts alone.
    assert steps or case.startswith("mod ")


def _check(served: Served, case: str) -> None:
    assert served.engine.llm.reset_prefix_cache()
    policy = served.policy(case)
    expected = served.run(policy)
    groups = served.engine.runner.kv_cache_config.kv_cache_groups
    of_layer = {name: i for i, group in enumerate(groups) for name in group.layer_names}
    with record_writes(of_layer) as written:
        output = served.engine.run([PROMPT], [policy], TOKENS, records=[case])[0]
    record = served.engine.take_record(case)
    assert output.outputs[0].token_ids == expected.tokens, f"margin {expected.margin}"
    exits = np.bincount([max(e, 0) for e in expected.exits], minlength=LAYERS)
    assert record.exits.tolist() == exits.tolist()
    if expected.mask is not None:
        assert record.mask == {"attention": sorted(expected.mask), "mlp": sorted(expected.mask)}
    _check_kv(served, policy, expected, written)
    if policy.exit is not None:
        assert exits[:-1].any(), "some tokens must leave early"
        assert exits[-1] or policy.exit.method == "patience", "and some stay"


def _check_kv(served: Served, policy: RoutingPolicy, expected, written) -> None:
    """Every slot that a later token attends holds the reference's keys and values."""
    ran = expected.ran[..., 0]
    positions = len(ran)
    needed = torch.ones(positions, LAYERS, dtype=torch.bool)
    never = [layer for layer in range(LAYERS) if not ran[len(PROMPT) :, layer].any()]
    if policy.exit is None or policy.exit.kv is MissingKV.PROPAGATE:
        # A layer that no generated token attends in owes nobody anything.
        exits = policy.exit is not None
        for layer in never:
            needed[:, layer] = exits and layer not in policy.skip.attention
    else:
        # Tokens that still wait at the end were never needed.
        full = [i for i, left in enumerate(expected.left) if left is None]
        needed[len(PROMPT) + full[-1] + 1 :] = False
    names = [layer.kv_name for layer in served.engine.runner.routed.stack.layers]
    values = expected.values
    if served.expected.reference.model.config.model_type == "deepseek_v3":
        values = [in_pairs(states) for states in values]
    assert_same_kv(written, names, expected.keys, values, needed)


@pytest.mark.family("llama")
@pytest.mark.parametrize("kv", list(MissingKV))
@pytest.mark.parametrize(("layers", "share"), [((1,), 0.6), ((1, 3), 0.8), ((4,), 0.5)])
def test_sparing_tests_while_it_pays(
    served: Served, layers: tuple[int, ...], share: float, kv: MissingKV
) -> None:
    """As the reference tells from the model's own sizes; alone, preempted, and with a neighbour."""
    rule = served.rule("confidence", layers, share, kv=kv)
    sparing = served.rule("confidence", layers, share, kv=kv, sparing=True)
    policy = RoutingPolicy(exit=sparing)
    assert served.engine.llm.reset_prefix_cache()
    expected, always = (
        served.expected.reference.run(PROMPT, each, LONG, block_size=served.block)
        for each in (policy, RoutingPolicy(exit=rule))
    )
    output = served.engine.run([PROMPT], [policy], LONG, records=["sparing"])[0]
    record = served.engine.take_record("sparing")
    assert output.outputs[0].token_ids == expected.tokens, expected.margin
    exits = np.bincount([max(e, 0) for e in expected.exits], minlength=LAYERS)
    assert record.exits.tolist() == exits.tolist()
    assert expected.left != always.left, "the rule must matter"
    again = served.engine.generate_preempted([PROMPT], [policy], LONG, {9, 20})
    assert again == [expected.tokens]
    prompts, policies = [PROMPT, PROMPT[:20]], [policy, RoutingPolicy(exit=rule)]
    assert served.engine.generate(prompts, policies, LONG)[0] == expected.tokens


@pytest.mark.parametrize("plan_layers", [None, compact, KEEP_ALL])
def test_neighbours_do_not_matter(
    served: Served, monkeypatch: pytest.MonkeyPatch, plan_layers: LayerPlanner | None
) -> None:
    """All methods in one batch, prompts of different lengths, however the layers are planned."""
    if plan_layers is not None:
        plan_by(served.engine, monkeypatch, plan_layers)
    assert served.engine.llm.reset_prefix_cache()
    # Elastic rows would agree with each other.
    cases = [case for case in CASES if not case.startswith("elastic")]
    policies = [served.policy(case) for case in cases]
    prompts = [PROMPT[: 20 + (7 * i) % 26] for i in range(len(cases))]
    expected = [
        served.run(policy, len(prompt)) for prompt, policy in zip(prompts, policies, strict=True)
    ]
    together = served.engine.generate([*prompts, PROMPT], [*policies, None], TOKENS)
    for case, run, tokens in zip(cases, expected, together, strict=False):
        assert tokens == run.tokens, (case, run.margin)
    assert together[-1] == served.run(RoutingPolicy()).tokens


@pytest.mark.parametrize("kernels", [AUTO], indirect=True, scope="module")
def test_first_masks_the_prompt_too(
    kernels: str, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`masked_prefill` needs whole prompts, so it runs without chunked prefill."""
    folder = make_model("llama", models_folder / "depth-masked")
    reference = Reference(folder)
    heads = random_heads(reference.states(PROMPT))
    profile = write_profile(models_folder / "profile-masked", reference, heads)
    monkeypatch.setenv(PROFILE_ENV, str(profile))
    policy = RoutingPolicy(adaptive=AdaptiveRule("first", threshold=0.5, masked_prefill=True))
    prompts = [PROMPT[:length] for length in (45, 20, 33)]
    expected = [reference.run(prompt, policy, TOKENS, heads) for prompt in prompts]
    with engine(folder, enable_chunked_prefill=False, max_num_batched_tokens=512) as running:
        records = ["a", "b", "c"]
        outputs = running.run(prompts, [policy] * 3, TOKENS, records=records)
        for output, run, record in zip(outputs, expected, records, strict=True):
            assert output.outputs[0].token_ids == run.tokens, run.margin
            taken = running.take_record(record)
            assert taken.mask["mlp"] == sorted(run.mask)
            prefill = taken.counts[0, :, 0, 0]
            assert (prefill == 0).nonzero()[0].tolist() == sorted(run.mask)
        tokens = [run.tokens for run in expected]
        for keep_cache in (False, True):
            again = running.generate_preempted(
                prompts, [policy] * 3, TOKENS, {3, 9}, keep_cache=keep_cache
            )
            assert again == tokens
    assert any(run.mask for run in expected)
