"""The expert reference's re-mixing, budgets and contrast, alone and among neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.reference import Reference
from support.references.budgets import shared_experts
from support.references.expert_checks import (
    FAMILIES,
    assert_same_run,
    changed,
    drawn_references,
    drawn_remix,
)
from support.references.experts import ExpertReference
from support.references.remixes import ReferenceStore
from support.references.routes import Asked, choice_scores, ordered, stock_selection
from support.references.streams import ExpertRun
from support.tiny import VOCABULARY, make_model

from sluice.models.policy.experts import (
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.policy.policy import Phase, SkipSet

TOKENS = 8
PROMPT = [(13 * i * i + 17 * i + 2) % VOCABULARY for i in range(21)]
STOCK = ExpertPolicy()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, models_folder: Path) -> Path:
    return make_model(request.param, models_folder / f"experts-{request.param}")


@pytest.fixture(scope="module")
def reference(folder: Path) -> ExpertReference:
    return ExpertReference(folder)


@pytest.fixture(scope="module")
def stock(reference: ExpertReference) -> ExpertRun:
    return reference.run(PROMPT, STOCK, TOKENS)


@pytest.mark.parametrize("scope", list(RemixScope))
@pytest.mark.parametrize("method", [RemixMethod.KERNEL, RemixMethod.MODE])
def test_remix_acts_where_it_should(
    reference: ExpertReference, stock: ExpertRun, method: str, scope: str
) -> None:
    critical = reference.layers[1:3]
    policy = ExpertPolicy(remix=drawn_remix(reference, method, scope))
    run = reference.run(PROMPT, policy, TOKENS, references=drawn_references(reference))
    last = len(PROMPT) - 1
    # A row is re-mixed if its weights are not what its own scores would make them.
    moved = set()
    for layer, rows, scores in zip(run.layers, run.selected, run.scores, strict=True):
        router = reference.routers[layer]
        for position, row in enumerate(rows):
            own = {expert: float(scores[position, expert]) for expert in row}
            total = sum(own.values()) if router.renormalize else 1.0
            stays = {expert: router.scale * score / total for expert, score in own.items()}
            if row != pytest.approx(stays, abs=1e-5):
                moved.add((layer, position))
    end = len(PROMPT) + TOKENS - 1 if scope == "decode" else len(PROMPT)
    assert moved == {(layer, position) for layer in critical for position in range(last, end)}
    after = [each.scores[3][: len(PROMPT)] for each in (run, stock)]
    torch.testing.assert_close(after[0][:last], after[1][:last], atol=1e-5, rtol=1e-4)
    assert (after[0][last] - after[1][last]).abs().max() > 1e-4


def test_a_prompt_is_the_mean_of_its_tokens(reference: ExpertReference) -> None:
    table = reference.model.model.embed_tokens.weight
    mean = reference.embedding([3, 8, 3])
    torch.testing.assert_close(mean, (2.0 * table[3] + table[8]) / 3.0)
    # Of two references, the nearer by that embedding is taken.
    pathways = torch.zeros(2, 1, reference.experts)
    pathways[0, 0, 2] = pathways[1, 0, 5] = 1.0
    own = reference.embedding(PROMPT)
    store = ReferenceStore(torch.stack([table[PROMPT[0]], own]), pathways, reference.layers[:1])
    only = {"layers": reference.layers[:1], "top": reference.experts, "alpha": 0.0, "neighbors": 1}
    policy = ExpertPolicy(remix=drawn_remix(reference, "kernel", "last", **only), top_k=1)
    run = reference.run(PROMPT, policy, 2, references={"drawn": store})
    assert set(run.selected[0][len(PROMPT) - 1]) == {5}


def test_supplied_pathways_replace_the_scores(reference: ExpertReference) -> None:
    layer, experts = reference.layers[0], reference.experts
    router = reference.routers[layer]
    pathway = [0.0] * experts
    pathway[5] = 1.0
    supplied = Remix(
        RemixMethod.SUPPLIED,
        RemixScope.DECODE,
        0.0,
        (layer,),
        experts,
        pathway=(tuple(pathway),),
    )
    run = reference.run(PROMPT, ExpertPolicy(remix=supplied, top_k=1), TOKENS)
    for position in range(len(PROMPT) - 1, len(PROMPT) + TOKENS - 1):
        mass = 1.0 if router.renormalize else float(run.scores[0][position].sum())
        assert run.selected[0][position] == {5: pytest.approx(router.scale * mass, abs=1e-5)}


def test_budgets_bind_the_decode_rows(reference: ExpertReference) -> None:
    """Three requests to a budget, all budgets in one batch, and one that has none."""
    budgets = [
        ExpertBudget(BudgetMethod.OEA, k0=1),
        ExpertBudget(BudgetMethod.XSHARE, experts=3),
        ExpertBudget(BudgetMethod.LYNX, experts=3),
    ]
    prompts = [PROMPT[:length] for length in (21, 17, 9)]
    policies = [ExpertPolicy(budget=budget) for budget in budgets for _ in prompts]
    *bound, last = reference.run_together(
        [*prompts * len(budgets), PROMPT], [*policies, STOCK], TOKENS
    )
    free = [reference.run(prompt, STOCK, TOKENS) for prompt in prompts]
    assert_same_run(last, free[0])
    moved = 0
    for n, budget in enumerate(budgets):
        runs = bound[3 * n : 3 * n + 3]
        for prompt, run, unbound in zip(prompts, runs, free, strict=True):
            assert run.tokens[0] == unbound.tokens[0]
            for layer, usual in zip(run.selected, unbound.selected, strict=True):
                assert list(map(set, layer[: len(prompt)])) == list(map(set, usual[: len(prompt)]))
        for i, layer in enumerate(reference.layers):
            router = reference.routers[layer]
            for step in range(TOKENS - 1):
                at = [len(prompt) + step for prompt in prompts]
                scores = [run.scores[i][p].tolist() for run, p in zip(runs, at, strict=True)]
                choices = [choice_scores(row, router, Asked()) for row in scores]
                shared = shared_experts(budget, scores, choices)
                for run, p, row, choice in zip(runs, at, scores, choices, strict=True):
                    within = [e for e in ordered(choice) if e in shared][: router.top_k]
                    assert set(run.selected[i][p]) == set(within)
                    moved += set(within) != stock_selection(row, router)
    assert moved


def test_neighbours_do_not_matter_without_a_budget(reference: ExpertReference) -> None:
    layer = reference.layers[-1]
    policies = [
        ExpertPolicy(top_k=1),
        ExpertPolicy(contrast=Contrast(1, 0.5, 0.1)),
        ExpertPolicy(bias=((layer, 3, 0.5),), top_p=0.6),
        ExpertPolicy(remix=drawn_remix(reference, "mode", "decode")),
    ]
    prompts = [PROMPT[: 12 + 3 * i] for i in range(len(policies))]
    store = drawn_references(reference)
    together = reference.run_together(prompts, policies, TOKENS, references=store)
    for prompt, policy, run in zip(prompts, policies, together, strict=True):
        assert_same_run(run, reference.run(prompt, policy, TOKENS, references=store))


def test_contrast_of_no_weight_is_greedy(reference: ExpertReference, stock: ExpertRun) -> None:
    run = reference.run(PROMPT, ExpertPolicy(contrast=Contrast(0, 0.0, 0.1)), TOKENS)
    assert_same_run(run, stock)
    assert run.weak is not None
    assert all(len(row) == 1 for layer in run.weak.selected for row in layer)
    # A bar at the best probability leaves only the greedy token.
    assert (
        reference.run(PROMPT, ExpertPolicy(contrast=Contrast(1, 2.0, 1.0)), TOKENS).tokens
        == stock.tokens
    )


@torch.no_grad()
def test_the_weak_pass_is_a_model_of_one_expert(
    reference: ExpertReference, stock: ExpertRun
) -> None:
    """Written out with two models: their logits, combined here."""
    contrast = Contrast(0, 0.9, 0.05)
    with changed(reference) as other:
        for layer, gate in other._gates.items():
            scale = other.routers[layer].scale

            def alone(_module, _inputs, output, *, layer=layer, scale=scale):
                router = other.routers[layer]
                choice = router.scores(output[0])
                if router.correction is not None:
                    choice = choice + torch.tensor(router.correction)
                # The best expert of all is in a kept group where groups go by their best one.
                if router.groups > 1 and router.correction is not None:
                    groups = choice.view(len(choice), router.groups, -1)
                    reach = groups.topk(2).values.sum(-1)
                    kept = reach >= reach.topk(router.topk_group).values[:, -1:]
                    choice = groups.masked_fill(~kept[..., None], -math.inf).view_as(choice)
                best = choice.argmax(dim=-1, keepdim=True)
                return output[0], torch.full(best.shape, scale), best

            gate.register_forward_hook(alone)
        sequence = list(PROMPT)
        for _ in range(TOKENS):
            strong = reference.model(torch.tensor([sequence])).logits[0, -1]
            weak = other.model(torch.tensor([sequence])).logits[0, -1]
            plausible = strong.softmax(-1) >= 0.05 * strong.softmax(-1).max()
            score = strong + 0.9 * (strong - weak)
            sequence.append(int(score.masked_fill(~plausible, -math.inf).argmax()))
    run = reference.run(PROMPT, ExpertPolicy(contrast=contrast), TOKENS)
    assert run.tokens == sequence[len(PROMPT) :]
    assert run.tokens != stock.tokens


@pytest.mark.parametrize("phase", list(Phase))
def test_depth_and_experts_together(folder: Path, reference: ExpertReference, phase: Phase) -> None:
    skip = SkipSet.of(attention=(1, 3), mlp=(2, 3), phase=phase)
    run = reference.run(PROMPT, STOCK, TOKENS, skip=skip)
    assert run.tokens == Reference(folder).greedy(PROMPT, skip, TOKENS)
    assert_same_run(reference.run(PROMPT, ExpertPolicy(top_p=1.0), TOKENS, skip=skip), run)
    acts = {Phase.PREFILL: {True}, Phase.DECODE: {False}, Phase.BOTH: {True, False}}[phase]
    for position, row in enumerate(run.selected[reference.layers.index(2)]):
        assert (not row) == ((position < len(PROMPT)) in acts)
