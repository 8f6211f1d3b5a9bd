"""Every expert control on every family, against transformers with patched routers: the same
experts, weights to 1e-5 and the same tokens, alone and among neighbours."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.dispatch import Dispatch, recorded
from support.engine import Engine, engine
from support.references.expert_checks import FAMILIES, drawn_references, drawn_remix
from support.references.experts import ExpertReference
from support.references.remixes import ReferenceStore
from support.references.routes import TIE
from support.references.streams import ExpertRun
from support.tiny import LAYERS, VOCABULARY, make_model

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import (
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertId,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.profile.fingerprint import fingerprint
from sluice.models.profile.profile import PROFILE_ENV
from sluice.models.profile.writer import write_profile

TOKENS = 6


@dataclass(frozen=True)
class Served:
    """A family on the engine, and its reference."""

    engine: Engine
    reference: ExpertReference
    shape: ExpertShape
    super_experts: tuple[ExpertId, ...]
    references: dict[str, ReferenceStore]

    def expected(
        self, prompt: list[int], policy: ExpertPolicy, skip: SkipSet | None = None
    ) -> ExpertRun:
        return self.reference.run(
            prompt,
            policy,
            TOKENS,
            skip=skip,
            super_experts=self.super_experts,
            references=self.references,
        )


SERVED = FAMILIES
CHOSEN = ("olmoe", "deepseek_v3")
"""Softmax, and groups with sigmoid and correction."""
INTERPRETED_FAMILIES = ("deepseek_v3",)
"""Softmax with Triton is in `test_kernel_choices.py`, with the same controls."""


class Known(ExpertReference):
    """Works out once what several engines of a family are held against."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._runs: dict[Any, list[ExpertRun]] = {}

    def run_together(
        self,
        prompts: Sequence[Sequence[int]],
        policies: Sequence[ExpertPolicy],
        tokens: int,
        **settings: Any,
    ) -> list[ExpertRun]:
        skips = tuple(settings.get("skips") or ())
        key = tuple(map(tuple, prompts)), tuple(policies), tokens, skips
        if key not in self._runs:
            self._runs[key] = super().run_together(prompts, policies, tokens, **settings)
        return self._runs[key]


@pytest.fixture(scope="module")
def known(models_folder: Path) -> Callable[[str], Known]:
    return cache(lambda family: Known(make_model(family, models_folder / f"routed-{family}")))


@pytest.fixture(scope="module")
def served(
    family: str, kernels: str, known: Callable[[str], Known], models_folder: Path
) -> Iterator[Served]:
    reference = known(family)
    references = drawn_references(reference)
    super_experts = tuple((layer, layer % reference.experts) for layer in reference.layers)
    profile = write_expert_profile(
        models_folder / f"routed-{family}-{kernels}-profile", reference, super_experts, references
    )
    os.environ[PROFILE_ENV] = str(profile)
    try:
        with engine(Path(reference.model.config.name_or_path)) as running:
            answer = running.runner.expert_answer
            assert answer["refusal"] is None, answer
            shape = ExpertShape.from_dict(answer["shape"])
            yield Served(running, reference, shape, super_experts, references)
    finally:
        del os.environ[PROFILE_ENV]


def write_expert_profile(
    folder: Path,
    reference: ExpertReference,
    super_experts: tuple[ExpertId, ...],
    references: dict[str, ReferenceStore],
) -> Path:
    config = reference.model.config
    fields = {
        "model": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "fingerprint": fingerprint(Path(config.name_or_path)),
        },
        "super_experts": super_experts,
        "references": {
            name: {"layers": store.layers, "width": store.embeddings.shape[1]}
            for name, store in references.items()
        },
    }
    tensors = {
        f"{name}.{part}": getattr(store, part)
        for name, store in references.items()
        for part in ("embeddings", "pathways")
    }
    write_profile(folder, fields, {}, tensors)
    return folder


def prompt(seed: int, low: int = 3, high: int = 30) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(rng.randrange(low, high))]


def some(served: Served, seed: int, per_layer: int) -> tuple[ExpertId, ...]:
    """Experts of every layer, without super experts."""
    rng = random.Random(seed)
    return tuple(
        (layer, expert)
        for layer in served.shape.layers
        for expert in sorted(rng.sample(range(served.shape.experts), per_layer))
        if (layer, expert) not in served.super_experts
    )


def supplied(served: Served) -> Remix:
    rng = random.Random(11)
    layers = served.shape.layers[-2:]
    pathway = tuple(tuple(rng.random() for _ in range(served.shape.experts)) for _ in layers)
    return Remix(RemixMethod.SUPPLIED, RemixScope.DECODE, 0.25, layers, 5, pathway=pathway)


def policies(served: Served) -> dict[str, ExpertPolicy]:
    """One policy for every control, and mixtures."""
    shape, k = served.shape, served.shape.top_k
    one, two = some(served, 1, 1), some(served, 2, 2)
    forced = tuple((layer, e, None) for layer, e in some(served, 3, 1))
    weighed = tuple((layer, e, 0.3) for layer, e in some(served, 4, 1))
    bias = tuple((layer, e, 0.2) for layer, e in two)
    per_layer = tuple(1 + layer % k for layer in range(LAYERS))
    asked = {
        "mask": ExpertPolicy(masked=two),
        "drop": ExpertPolicy(dropped=some(served, 5, k - 1)),
        "force": ExpertPolicy(forced=forced),
        "force, weighed": ExpertPolicy(forced=weighed, protect=False),
        "bias": ExpertPolicy(bias=bias),
        "top_k 1": ExpertPolicy(top_k=1),
        "top_k 1, unprotected": ExpertPolicy(top_k=1, protect=False),
        "top_k 4": ExpertPolicy(top_k=4),
        "top_k by layer": ExpertPolicy(top_k=per_layer),
        "top_p": ExpertPolicy(top_p=0.3),
        "top_p of more": ExpertPolicy(top_p=0.5, top_k=4, protect=False),
        "ratio": ExpertPolicy(skip_ratio=0.6),
        "ratio by layer": ExpertPolicy(
            skip_ratio=tuple(0.15 * layer for layer in range(LAYERS)), top_k=4
        ),
        "remix, kernel": ExpertPolicy(remix=drawn(served, "kernel", "decode", max_similarity=0.9)),
        "remix, cosine": ExpertPolicy(
            remix=drawn(served, "kernel", "last", kernel="cosine", bandwidth=None)
        ),
        "remix, mode": ExpertPolicy(remix=drawn(served, "mode", "decode")),
        "remix, supplied": ExpertPolicy(remix=supplied(served)),
        "contrast": ExpertPolicy(contrast=Contrast(weak_rank=1, beta=0.5, alpha=0.1)),
        "contrast, far": ExpertPolicy(contrast=Contrast(weak_rank=3, beta=2.0, alpha=0.01)),
        "mixture": ExpertPolicy(
            masked=one,
            forced=tuple(f for f in forced if f[:2] not in one),
            bias=tuple(b for b in bias if b[:2] not in one),
            top_k=3,
            skip_ratio=0.3,
            top_p=0.8,
            remix=supplied(served),
        ),
    }
    if shape.groups > 1:
        # A budget, an override or a mask may not ask for more than the chosen groups hold.
        asked["mask"] = ExpertPolicy(masked=one)
    return asked


def drawn(served: Served, method: str, scope: str, **changes: object) -> Remix:
    limits = {"max_similarity": 0.95} if method == "kernel" else {}
    return drawn_remix(served.reference, method, scope, **{**limits, **changes})


def assert_dispatched(
    served: Served, dispatch: Dispatch, record: str, run: ExpertRun, weak: bool = False
) -> None:
    """The engine's experts and weights are the reference's, everywhere."""
    # vLLM may leave the model's factor on all weights to what follows the dispatch.
    later = served.reference.routers[run.layers[0]].scale / served.shape.scale
    found = (dispatch.weak if weak else dispatch.strong)[record]
    wanted = {
        (place, position): row
        for place, layer in enumerate(run.selected)
        for position, row in enumerate(layer)
        if row
    }
    # A row that leaves a layer out may be kept in it and its output ignored.
    assert found.keys() >= wanted.keys()
    for key, row in wanted.items():
        assert set(found[key]) == set(row), (key, found[key], row, run.margin)
        whole = {expert: later * weight for expert, weight in found[key].items()}
        assert whole == pytest.approx(row, abs=1e-5), key
    if run.weak is not None and not weak:
        assert_dispatched(served, dispatch, record, run.weak, weak=True)


@dataclass(frozen=True)
class Controls:
    """Every control with its prompt and what the reference makes of it, by name."""

    prompts: dict[str, list[int]]
    routed: dict[str, RoutingPolicy]
    runs: dict[str, ExpertRun]


@pytest.fixture(scope="module")
def controls(served: Served) -> Controls:
    asked = policies(served)
    prompts = {name: prompt(number) for number, name in enumerate(asked)}
    runs = {name: served.expected(prompts[name], policy) for name, policy in asked.items()}
    for name, run in runs.items():
        assert run.margin > TIE, f"{name}: choose another prompt"
    routed = {name: RoutingPolicy(experts=policy) for name, policy in asked.items()}
    return Controls(prompts, routed, runs)


# Not interpreted: the same rows as among neighbours, in many more calls.
def test_every_control_alone(served: Served, controls: Controls) -> None:
    with recorded(served.engine.runner) as dispatch:
        for name, run in controls.runs.items():
            own, asked = controls.prompts[name], controls.routed[name]
            assert served.engine.generate([own], [asked], TOKENS, records=[name]) == [run.tokens]
            assert_dispatched(served, dispatch, name, run)


@pytest.mark.interpreted
def test_every_control_among_neighbours(served: Served, controls: Controls, ran: set[str]) -> None:
    own = controls.prompts["mask"]
    (stock,) = served.engine.generate([own], [None], TOKENS)
    with recorded(served.engine.runner) as dispatch:
        names = list(controls.runs)
        outputs = served.engine.generate(
            [*controls.prompts.values(), own],
            [*controls.routed.values(), None],
            TOKENS,
            records=[*names, ""],
        )
        for name, tokens in zip(names, outputs[:-1], strict=True):
            assert tokens == controls.runs[name].tokens, name
            assert_dispatched(served, dispatch, name, controls.runs[name])
        assert outputs[-1] == stock
    assert ran >= {"route_topk", "contrast_logits"}


@pytest.mark.interpreted
def test_budgets_of_a_batch(served: Served, ran: set[str]) -> None:
    """Requests whose prompts end together share a set from their first generated token on."""
    budgets = [
        ExpertBudget(BudgetMethod.OEA, k0=1),
        ExpertBudget(BudgetMethod.XSHARE, experts=4),
        ExpertBudget(BudgetMethod.LYNX, experts=4),
    ]
    asked = [ExpertPolicy(budget=budget) for budget in budgets for _ in range(3)]
    asked.append(ExpertPolicy(budget=budgets[0], masked=some(served, 7, 1)))
    prompts = [prompt(100 + number, 5, 12) for number in range(len(asked))]
    runs = served.reference.run_together(
        prompts, asked, TOKENS, super_experts=served.super_experts, references=served.references
    )
    names = [str(number) for number in range(len(asked))]
    routed = [RoutingPolicy(experts=policy) for policy in asked]
    with recorded(served.engine.runner) as dispatch:
        outputs = served.engine.generate(prompts, routed, TOKENS, records=names)
    for name, tokens, run in zip(names, outputs, runs, strict=True):
        assert tokens == run.tokens
        assert_dispatched(served, dispatch, name, run)
    assert ran >= {"router_scores", "batch_budget", "route_topk"}


def test_with_skipped_sublayers(served: Served) -> None:
    """Rows that leave a layer out are not routed there, and the others keep their controls."""
    skips = [
        SkipSet.of(blocks=(2,)),
        SkipSet.of(attention=(1, 3), mlp=(4,), phase=Phase.DECODE),
        SkipSet.of(mlp=(0, 5), phase=Phase.PREFILL),
    ]
    asked = [
        ExpertPolicy(top_k=1, protect=False),
        ExpertPolicy(masked=some(served, 8, 1)),
        ExpertPolicy(skip_ratio=0.5),
    ]
    prompts = [prompt(200 + number) for number in range(3)]
    names = [str(number) for number in range(3)]
    routed = [
        RoutingPolicy(skip, experts=policy) for skip, policy in zip(skips, asked, strict=True)
    ]
    with recorded(served.engine.runner) as dispatch:
        outputs = served.engine.generate(
            [*prompts, prompts[0]], [*routed, None], TOKENS, records=[*names, ""]
        )
    for name, tokens, own, policy, skip in zip(names, outputs, prompts, asked, skips, strict=False):
        run = served.expected(own, policy, skip)
        assert tokens == run.tokens
        assert_dispatched(served, dispatch, name, run)


def test_a_control_changes_tokens(served: Served) -> None:
    """Guards the tests above: a control that is not applied must be visible."""
    own = [prompt(seed, 20, 30) for seed in (7, 8, 9)]
    stock = served.engine.generate(own, [None] * 3, TOKENS)
    asked = RoutingPolicy(experts=ExpertPolicy(top_k=1, protect=False))
    assert served.engine.generate(own, [asked] * 3, TOKENS) != stock
