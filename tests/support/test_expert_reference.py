"""The expert reference against stock transformers, and against models changed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.references.expert_checks import (
    FAMILIES,
    assert_same_run,
    changed,
    drawn_references,
    drawn_remix,
)
from support.references.experts import ExpertReference
from support.references.streams import ExpertRun
from support.tiny import LAYERS, VOCABULARY, make_model
from torch import Tensor

from sluice.models.policy.experts import ExpertPolicy

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


def dense(run: ExpertRun, experts: int) -> Tensor:
    """Weights, (layers, positions, experts); 0 where an expert did not run."""
    weights = torch.zeros(len(run.selected), len(run.selected[0]), experts)
    for i, layer in enumerate(run.selected):
        for j, row in enumerate(layer):
            for expert, weight in row.items():
                weights[i, j, expert] = weight
    return weights


@torch.no_grad()
def generated(reference: ExpertReference) -> tuple[list[int], dict[int, list[dict[int, float]]]]:
    """Tokens of transformers' own generation, and what its routers gave out on the way."""
    seen: dict[int, list[dict[int, float]]] = {layer: [] for layer in reference.layers}

    def keep(layer: int):
        def hook(_module: object, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            for weights, experts in zip(output[1].tolist(), output[2].tolist(), strict=True):
                seen[layer].append(dict(zip(experts, weights, strict=True)))

        return hook

    hooks = [gate.register_forward_hook(keep(i)) for i, gate in reference._gates.items()]
    output = reference.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False
    )
    for hook in hooks:
        hook.remove()
    return output[0, len(PROMPT) :].tolist(), seen


def test_nothing_asked_is_stock(reference: ExpertReference, stock: ExpertRun) -> None:
    tokens, seen = generated(reference)
    assert_same_run(stock, replace(stock, tokens=tokens, selected=list(seen.values())))
    assert len(set(stock.tokens)) > 2, "an answer that shows a change"


@pytest.mark.parametrize("control", ["cuts", "bias", "remix"])
def test_neutral_controls_are_stock(
    reference: ExpertReference, stock: ExpertRun, control: str
) -> None:
    top_k = (reference.routers[reference.layers[0]].top_k,) * LAYERS
    neutral = drawn_remix(reference, "kernel", "decode", alpha=1.0)
    policy = {
        "cuts": ExpertPolicy(top_k=top_k, skip_ratio=0.0, top_p=1.0),
        "bias": ExpertPolicy(bias=tuple((layer, 0, 0.0) for layer in reference.layers)),
        "remix": ExpertPolicy(remix=neutral),
    }[control]
    run = reference.run(PROMPT, policy, TOKENS, references=drawn_references(reference))
    assert_same_run(run, stock)


def test_top_k_is_a_model_of_fewer_experts(reference: ExpertReference) -> None:
    with changed(reference) as other:
        for gate in other._gates.values():
            gate.top_k = 1
        tokens, seen = generated(other)
    run = reference.run(PROMPT, ExpertPolicy(top_k=1), TOKENS)
    assert_same_run(run, replace(run, tokens=tokens, selected=list(seen.values())))


def test_a_dropped_expert_is_not_replaced(reference: ExpertReference, stock: ExpertRun) -> None:
    layer, expert = busiest(reference, stock)
    router = reference.routers[layer]
    run = reference.run(PROMPT, ExpertPolicy(dropped=((layer, expert),)), TOKENS)
    for row, usual in zip(run.selected[1][: len(PROMPT)], stock.selected[1], strict=False):
        rest = {other: weight for other, weight in usual.items() if other != expert}
        total = sum(rest.values()) / router.scale if router.renormalize else 1.0
        assert row == pytest.approx({e: w / total for e, w in rest.items()}, abs=1e-5)
    assert (run.scores[-1][0] - stock.scores[-1][0]).abs().max() > 1e-4
    if router.renormalize:
        return
    # Where the others gain nothing, a dropped expert is one that puts out nothing.
    with changed(reference) as other:
        other.model.model.layers[layer].mlp.experts.down_proj[expert] = 0.0
        expected = other.run(PROMPT, STOCK, TOKENS)
    assert run.tokens == expected.tokens
    torch.testing.assert_close(run.scores, expected.scores, atol=1e-5, rtol=1e-4)


def test_a_masked_expert_never_runs(reference: ExpertReference, stock: ExpertRun) -> None:
    layer, expert = busiest(reference, stock)
    router = reference.routers[layer]
    run = reference.run(PROMPT, ExpertPolicy(masked=((layer, expert),)), TOKENS)
    assert all(expert not in row and len(row) == router.top_k for row in run.selected[1])
    if router.sigmoid or not router.renormalize:
        return

    # Renormalised softmax weights are those of a router without the expert's logit.
    def silent(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0].clone()
        logits[..., expert] = -1e9
        return (logits, *output[1:])

    with changed(reference) as other:
        other._gates[layer].register_forward_hook(silent)
        assert_same_run(run, other.run(PROMPT, STOCK, TOKENS))


def busiest(reference: ExpertReference, stock: ExpertRun) -> tuple[int, int]:
    """A layer and the expert that serves its first token most."""
    row = stock.selected[1][0]
    return reference.layers[1], max(row, key=lambda expert: row[expert])


def test_forced_experts_run(reference: ExpertReference, stock: ExpertRun) -> None:
    layer = reference.layers[-1]
    idle = int(dense(stock, reference.experts)[-1].sum(dim=0).argmin())
    run = reference.run(PROMPT, ExpertPolicy(forced=((layer, idle, None),)), TOKENS)
    assert all(idle in row for row in run.selected[-1])
    assert {len(row) for row in run.selected[-1]} == {reference.routers[layer].top_k}
    assert not all(idle in row for row in stock.selected[-1])


def test_protection_brings_experts_back(reference: ExpertReference, stock: ExpertRun) -> None:
    layer, row = reference.layers[1], stock.selected[1][0]
    expert = min(row, key=lambda expert: row[expert])
    top_k = [reference.routers[layer].top_k] * LAYERS
    top_k[layer] = 1
    policy, supers = ExpertPolicy(top_k=tuple(top_k)), ((layer, expert),)
    cut = reference.run(PROMPT, policy, TOKENS)
    kept = reference.run(PROMPT, policy, TOKENS, super_experts=supers)
    bare = replace(policy, protect=False)
    assert_same_run(reference.run(PROMPT, bare, TOKENS, super_experts=supers), cut)
    rows = [run.selected[1][: len(PROMPT)] for run in (stock, cut, kept)]
    added = 0
    for usual, only, held in zip(*rows, strict=True):
        assert set(held) == set(only) | ({expert} & set(usual))
        added += len(held) - len(only)
    assert added
