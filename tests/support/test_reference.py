"""The plain reference against transformers' own cache and generation; no engine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.reference import Reference
from support.references.choices import random_heads, threshold_between
from support.references.prompts import lac_ranges, mod_tokens
from support.references.walks import (
    assert_same_kv,
    cached_walk,
    chosen_walk,
    full_cache,
    layer_inputs,
)
from support.tiny import LAYERS, VOCABULARY, make_model
from torch import Tensor

from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)

TOKENS = 14
EXITS = tuple(range(LAYERS - 1))
PROMPT = [(37 * i * i + 11 * i + 5) % VOCABULARY for i in range(21)]
THRESHOLDED = ("confidence", "entropy", "saturation", "q_exit", "classifier")


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def reference(request: pytest.FixtureRequest, models_folder: Path) -> Reference:
    return Reference(make_model(request.param, models_folder / f"reference-{request.param}"))


@pytest.fixture(scope="module")
def heads(reference: Reference) -> dict[str, Tensor]:
    return random_heads(reference.states(PROMPT))


def exit_rule(reference: Reference, heads: dict[str, Tensor], method: str, kv: str) -> ExitRule:
    """A rule under which some tokens leave and some stay."""
    if method == "patience":
        return ExitRule(method, EXITS, patience=1, kv=MissingKV(kv))
    share = 0.1 if method == "entropy" else 0.9
    scores = reference.scores(PROMPT, method, EXITS, TOKENS, heads)
    threshold = threshold_between(scores, share)
    return ExitRule(method, EXITS, threshold=threshold, kv=MissingKV(kv))


def test_full_depth_equals_generate(reference: Reference) -> None:
    run = reference.run(PROMPT, RoutingPolicy(), TOKENS)
    output = reference.model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert run.tokens == output.sequences[0, len(PROMPT) :].tolist()
    assert_same_kv(run.keys, run.values, output.past_key_values)
    assert run.exits == [LAYERS - 1] * (TOKENS - 1)
    assert run.skipped == [frozenset()] * (TOKENS - 1)
    assert run.left == [None] * (TOKENS - 1)


@pytest.mark.parametrize("kv", list(MissingKV))
def test_an_exit_that_nobody_takes_is_full_depth(reference: Reference, kv: MissingKV) -> None:
    rule = ExitRule("confidence", EXITS, threshold=1.0, kv=kv)
    run = reference.run(PROMPT, RoutingPolicy(exit=rule), TOKENS)
    full = reference.run(PROMPT, RoutingPolicy(), TOKENS)
    assert (run.tokens, run.exits) == (full.tokens, full.exits)


@pytest.mark.parametrize(("skip", "gone"), [((), (3, 4, 5)), ((1,), (1, 3, 4, 5))])
def test_an_exit_that_everybody_takes_is_a_skip_set(
    reference: Reference, skip: tuple[int, ...], gone: tuple[int, ...]
) -> None:
    rule = ExitRule("confidence", (2,), threshold=0.0)
    static = SkipSet.of(blocks=skip, phase=Phase.DECODE)
    run = reference.run(PROMPT, RoutingPolicy(static, exit=rule), TOKENS)
    skipping = SkipSet.of(blocks=gone, phase=Phase.DECODE)
    expected = reference.run(PROMPT, RoutingPolicy(skipping), TOKENS)
    assert run.tokens == expected.tokens != reference.greedy(PROMPT, SkipSet(), TOKENS)
    assert run.exits == expected.exits == [2] * (TOKENS - 1)
    assert run.skipped == [frozenset(gone)] * (TOKENS - 1)


@pytest.mark.parametrize("kv", list(MissingKV))
@pytest.mark.parametrize("method", [*THRESHOLDED, "patience"])
def test_exits_equal_the_cached_walk(
    reference: Reference, heads: dict[str, Tensor], method: str, kv: MissingKV
) -> None:
    rule = exit_rule(reference, heads, method, kv)
    run = reference.run(PROMPT, RoutingPolicy(exit=rule), TOKENS, heads)
    tokens, exits, cache = cached_walk(reference, rule, heads, PROMPT, TOKENS, TOKENS)
    assert run.left == exits
    assert run.exits == [LAYERS - 1 if left is None else left for left in exits]
    assert run.tokens == tokens
    assert 0 < exits.count(None) < len(exits)
    if kv is MissingKV.RECOMPUTE:
        cache = full_cache(reference, PROMPT + tokens[:-1])
    assert_same_kv(run.keys, run.values, cache)


@pytest.mark.parametrize("method", ["saturation", "classifier"])
def test_decay_follows_the_requests_own_limit(
    reference: Reference, heads: dict[str, Tensor], method: str
) -> None:
    rule = exit_rule(reference, heads, method, "propagate")
    rule = ExitRule(method, EXITS, decay=8.0, threshold=rule.number("threshold"))
    policy = RoutingPolicy(exit=rule)
    short = reference.run(PROMPT, policy, TOKENS, heads, max_tokens=TOKENS)
    long = reference.run(PROMPT, policy, TOKENS, heads, max_tokens=1000)
    assert short.left == cached_walk(reference, rule, heads, PROMPT, TOKENS, TOKENS)[1]
    assert long.left == cached_walk(reference, rule, heads, PROMPT, TOKENS, 1000)[1]
    assert short.left != long.left


def test_recompute_forces_full_passes(reference: Reference) -> None:
    rule = ExitRule("entropy", (1, 3), threshold=20.0, kv=MissingKV.RECOMPUTE)
    policy = RoutingPolicy(exit=rule)
    run = reference.run(PROMPT, policy, TOKENS, pending_limit=4, block_size=8)
    # Generated tokens are fed at positions 21 to 33; 23 and 31 end a block, 28 finds four waiting.
    full = {23, 28, 31}
    assert run.left == [None if position in full else 1 for position in range(21, 34)]
    tokens, exits, _ = cached_walk(
        reference, rule, {}, PROMPT, TOKENS, TOKENS, pending_limit=4, block_size=8
    )
    assert (run.tokens, run.left) == (tokens, exits)
    free = reference.run(PROMPT, policy, TOKENS, pending_limit=99, block_size=99)
    assert free.left == [1] * (TOKENS - 1)


@pytest.mark.parametrize(
    ("method", "mode"), [("first", None), ("similarity", None), ("lac", "predict")]
)
def test_a_prompts_mask_is_a_skip_set_of_generated_tokens(
    reference: Reference, heads: dict[str, Tensor], method: str, mode: str | None
) -> None:
    scores = reference.prompt_scores(PROMPT, method, heads)
    threshold = threshold_between(scores, 0.5)
    rule = AdaptiveRule(method, mode=mode, threshold=threshold)
    run = reference.run(PROMPT, RoutingPolicy(adaptive=rule), TOKENS, heads)
    lower = {layer for layer, score in enumerate(scores) if score < threshold}
    assert run.mask == (set(range(LAYERS)) - lower if method == "similarity" else lower)
    assert 0 < len(run.mask) < LAYERS
    skip = SkipSet.of(blocks=tuple(run.mask), phase=Phase.DECODE)
    assert run.tokens == reference.greedy(PROMPT, skip, TOKENS)
    assert run.skipped == [run.mask] * (TOKENS - 1)
    assert bool(run.ran[: len(PROMPT)].all())


@torch.no_grad()
def test_masked_prefill_decides_on_what_has_run(
    reference: Reference, heads: dict[str, Tensor]
) -> None:
    threshold = threshold_between(reference.prompt_scores(PROMPT, "first", heads), 0.5)
    rule = AdaptiveRule("first", threshold=threshold, masked_prefill=True)
    run = reference.run(PROMPT, RoutingPolicy(adaptive=rule), TOKENS, heads)
    hidden, inputs = layer_inputs(reference, PROMPT, 0)
    mask = set()
    for i, layer in enumerate(reference.model.model.layers):
        logit = hidden[0].mean(dim=0) @ heads["first.weight"][i] + heads["first.bias"][i]
        if float(logit.sigmoid()) < threshold:
            mask.add(i)
        else:
            hidden = layer(hidden, **inputs)
    assert run.mask == mask
    assert mask
    assert run.tokens == reference.greedy(PROMPT, SkipSet.of(blocks=tuple(mask)), TOKENS)
    assert run.skipped == [frozenset(mask)] * (TOKENS - 1)
    assert not run.ran[:, sorted(mask)].any()


def test_replace_goes_on_from_the_input_of_void_layers(reference: Reference) -> None:
    alpha = 0.8
    policy = RoutingPolicy(adaptive=AdaptiveRule("lac", mode="replace", threshold=alpha))
    run = reference.run(PROMPT, policy, TOKENS)
    changes: list[Tensor] = []
    found: list[Tensor] = []

    def goes_on(layer: int, before: Tensor, after: Tensor) -> Tensor:
        if layer == 0:
            changes.clear()
            found.clear()
        change = after.norm(dim=-1) - before.norm(dim=-1)
        # Nothing, or one earlier layer, has no range.
        reach = torch.stack(changes).max(0)[0] - torch.stack(changes).min(0)[0] if changes else 0
        changes.append(change)
        found.append(change < alpha * reach)
        return torch.where(found[-1][..., None], before, after)

    sequence = list(PROMPT)
    for _ in range(TOKENS):
        token, cache = chosen_walk(reference, sequence, goes_on)
        sequence.append(token)
    assert run.tokens == sequence[len(PROMPT) :]
    assert_same_kv(run.keys, run.values, cache)
    void = torch.cat(found).T
    assert run.void is not None
    assert torch.equal(run.void, void)
    assert 0 < int(void.sum()) < void.numel()
    assert bool(run.ran.all())


def test_readout_reads_the_last_layer_that_is_not_void(reference: Reference) -> None:
    threshold = 0.9
    policy = RoutingPolicy(adaptive=AdaptiveRule("lac", mode="readout", threshold=threshold))
    run = reference.run(PROMPT, policy, TOKENS)
    read = set()
    for i, token in enumerate(run.tokens):
        states = reference.states(PROMPT + run.tokens[:i])
        void = [change < threshold * reach for change, reach in lac_ranges(states)]
        layer = max(i for i, gone in enumerate(void) if not gone)
        read.add(layer)
        normed = reference.model.model.norm(states[layer + 1, -1])
        assert token == int(reference.model.lm_head(normed).argmax())
    assert len(read) > 1
    assert_same_kv(run.keys, run.values, full_cache(reference, PROMPT + run.tokens[:-1]))
    assert bool(run.ran.all())


@pytest.mark.parametrize("retention", [None, (1.0, 0.5, 0.3, 0.0, 1.0, 0.2)])
def test_mod_passes_prompt_tokens_over(
    reference: Reference, retention: tuple[float, ...] | None
) -> None:
    policy = RoutingPolicy(adaptive=AdaptiveRule("mod", retention=retention))
    run = reference.run(PROMPT, policy, TOKENS)
    prompt = run.ran[: len(PROMPT)]
    kept = mod_tokens(reference.states(PROMPT)[0], LAYERS, retention)
    # Half a cosine over six layers: 1, 0.905, 0.655, 0.345, 0.095, 0 with 0.85 and 0.15 as ends.
    expected = [21, 21, 13, 7, 3, 3] if retention is None else [21, 10, 6, 1, 21, 4]
    assert [len(tokens) for tokens in kept] == expected
    for layer, tokens in enumerate(kept):
        assert {i for i in range(len(PROMPT)) if prompt[i, layer].all()} == tokens
        assert {i for i in range(len(PROMPT)) if prompt[i, layer].any()} == tokens
        assert len(PROMPT) - 1 in tokens
    assert bool(run.ran[len(PROMPT) :].all())

    def goes_on(layer: int, before: Tensor, after: Tensor) -> Tensor:
        runs = torch.tensor([i in kept[layer] or i >= len(PROMPT) for i in range(before.shape[1])])
        return torch.where(runs[:, None], after, before)

    sequence = list(PROMPT)
    for _ in range(TOKENS):
        token, cache = chosen_walk(reference, sequence, goes_on)
        sequence.append(token)
    assert run.tokens == sequence[len(PROMPT) :]
    assert_same_kv(run.keys, run.values, cache)
    assert run.tokens != reference.greedy(PROMPT, SkipSet(), TOKENS)


@torch.no_grad()
def test_sub_layers_are_told_apart(reference: Reference) -> None:
    skip = SkipSet(attention=(4, 5), mlp=(0, 5))
    run = reference.run(PROMPT, RoutingPolicy(skip), TOKENS)
    silent = copy.deepcopy(reference.model)
    for module, layers in (("self_attn", skip.attention), ("mlp", skip.mlp)):
        for layer in layers:
            for name, weight in silent.model.layers[layer].get_submodule(module).named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.zero_()
    output = silent.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    assert run.tokens == output[0, len(PROMPT) :].tolist()
    assert run.exits == [4] * (TOKENS - 1)
    assert run.skipped == [frozenset({5})] * (TOKENS - 1)
    assert run.ran[-1].tolist() == [
        [layer not in skip.attention, layer not in skip.mlp] for layer in range(LAYERS)
    ]
