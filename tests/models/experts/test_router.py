"""The routers of a step against the reference: random policies side by side, layer by layer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.budgets import shared_experts
from support.references.remixes import Remixer
from support.references.routes import (
    TIE,
    Asked,
    Route,
    Router,
    choice_scores,
    route,
    stock_selection,
    weak_route,
)
from support.routings import reference_router

from sluice.kernels.ops.router_config import ACTIVE, MASKED, ROUTED, ROWS, TAKEN
from sluice.kernels.ops.router_scores import plain_scores, selection_scores
from sluice.kernels.ops.routing_args import RouterSpec
from sluice.models.depth.masks import Segment
from sluice.models.experts.batch import BatchExperts
from sluice.models.experts.router import ExpertRouter
from sluice.models.policy.axes import DECODE, PREFILL
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

LAYERS = 7
BUDGETS = (
    ExpertBudget(BudgetMethod.OEA, k0=1),
    ExpertBudget(BudgetMethod.OEA, k0=2),
    ExpertBudget(BudgetMethod.XSHARE, experts=4),
    ExpertBudget(BudgetMethod.LYNX, experts=5),
)


@dataclass(frozen=True)
class Request:
    """One request of a step."""

    policy: ExpertPolicy
    prompt: int
    computed: int
    scheduled: int


@dataclass(frozen=True)
class Row:
    """One token of a step."""

    request: Request
    position: int
    weak: bool

    @property
    def decodes(self) -> bool:
        return self.position >= self.request.prompt

    @property
    def remixed(self) -> bool:
        remix, last = self.request.policy.remix, self.request.prompt - 1
        if remix is None or self.position < last:
            return False
        return self.position == last or remix.scope is RemixScope.DECODE


@dataclass(frozen=True)
class Model:
    """Routers of all layers, alike but for their correction."""

    shape: ExpertShape
    specs: tuple[RouterSpec, ...]
    super_experts: tuple[ExpertId, ...]

    def router(self, moe_index: int) -> Router:
        """A layer's, in the reference's words."""
        return reference_router(self.specs[moe_index])


def drawn_model(rng: random.Random) -> Model:
    groups = rng.choice([1, 1, 4])
    experts = rng.choice([8, 12, 16])
    shape = ExpertShape(
        layers=tuple(sorted(rng.sample(range(LAYERS), 4))),
        experts=experts,
        top_k=rng.choice([2, 3]),
        scoring=rng.choice(["softmax", "sigmoid"]),
        renormalize=rng.random() < 0.5,
        scale=rng.choice([1.0, 2.0]),
        groups=groups,
        topk_group=3 if groups > 1 else 1,
        corrected=groups > 1 and rng.random() < 0.5,
    )
    spec = RouterSpec(
        shape.top_k, shape.scoring, shape.renormalize, shape.scale, groups, shape.topk_group
    )
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    specs = tuple(
        replace(spec, correction=torch.randn(experts, generator=generator) * 0.1)
        if shape.corrected
        else spec
        for _ in shape.layers
    )
    supers = tuple((layer, rng.randrange(experts)) for layer in shape.layers)
    return Model(shape, specs, supers if rng.random() < 0.5 else ())


def drawn_policy(rng: random.Random, model: Model) -> ExpertPolicy:
    """What the server lets through: enough experts stay, and super experts are not named."""
    shape = model.shape
    if rng.random() < 0.15:
        return ExpertPolicy(contrast=Contrast(rng.randrange(shape.experts // 2), 0.5, 0.1))
    if rng.random() < 0.15:
        return ExpertPolicy()
    sometimes = [layer for layer in shape.layers if rng.random() < 0.7]
    named = {layer: rng.sample(range(shape.experts), 5) for layer in sometimes}
    top_k = rng.choice([None, None, 1, 3, tuple(1 + layer % 3 for layer in range(LAYERS))])
    budget = rng.choice([None, None, *BUDGETS])
    remix = None
    if rng.random() < 0.3:
        layers = tuple(sorted(rng.sample(shape.layers, 2)))
        rows = tuple(tuple(rng.random() for _ in range(shape.experts)) for _ in layers)
        scope, alpha = rng.choice(list(RemixScope)), rng.choice([0.0, 0.3])
        remix = Remix(RemixMethod.SUPPLIED, scope, alpha, layers, 6, pathway=rows)

    def pick(number: int, *, over: bool = True) -> list[ExpertId]:
        if not over or rng.random() < 0.5:
            return []
        return [(layer, own[number]) for layer, own in sorted(named.items())]

    def spared(ids: list[ExpertId]) -> tuple[ExpertId, ...]:
        return tuple(each for each in ids if each not in model.super_experts)

    return ExpertPolicy(
        masked=spared(pick(0)),
        dropped=spared(pick(1, over=budget is None and top_k in (None, 3))),
        forced=tuple((*each, rng.choice([None, 0.4])) for each in pick(2)),
        bias=tuple((*each, rng.choice([-0.1, 0.2])) for each in spared(pick(3))),
        top_k=top_k,
        top_p=rng.choice([None, None, 0.3]),
        skip_ratio=rng.choice([None, None, 0.5, tuple(0.1 * x for x in range(LAYERS))]),
        budget=budget,
        remix=remix,
        protect=rng.random() < 0.8,
    )


def drawn_requests(rng: random.Random, model: Model) -> list[Request]:
    pool = [drawn_policy(rng, model) for _ in range(rng.choice([1, 3]))]
    found = []
    for _ in range(rng.choice([1, 2, 5, 9])):
        prompt = rng.choice([1, 4, 9])
        computed = rng.choice([0, prompt - 1, prompt, prompt + 3])
        found.append(Request(rng.choice(pool), prompt, computed, rng.choice([1, 1, 4])))
    return found


class Step:
    """The requests of a step, as the engine lays them out."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.segments: list[Segment] = []
        self.owners: list[int] = []
        self.rows: list[Row] = []
        self.first_rows: list[int] = []
        for index, request in enumerate(requests):
            self.first_rows.append(len(self.rows))
            self._lay(index, request, index, weak=False)
        weak = [i for i, r in enumerate(requests) if r.policy.contrast is not None]
        for number, index in enumerate(weak):
            self._lay(index, requests[index], len(requests) + number, weak=True)

    def _lay(self, owner: int, request: Request, number: int, *, weak: bool) -> None:
        self.owners.append(owner)
        prefill = min(max(request.prompt - request.computed, 0), request.scheduled)
        for phase, length in ((PREFILL, prefill), (DECODE, request.scheduled - prefill)):
            if length:
                self.segments.append(Segment(number, phase, 0, length, weak=weak))
        here = range(request.computed, request.computed + request.scheduled)
        self.rows += [Row(request, position, weak) for position in here]


def expected(
    model: Model, moe_index: int, rows: list[Row], scores: torch.Tensor
) -> tuple[list[Route], set[int]]:
    """What the reference makes of rows, and which of them a near tie leaves open."""
    layer, router = model.shape.layers[moe_index], model.router(moe_index)
    prepared = []
    for row, raw in zip(rows, scores.tolist(), strict=True):
        mixed = raw
        policy = row.request.policy
        if row.remixed:
            assert policy.remix is not None
            mixed = Remixer(policy.remix, None, torch.zeros(1)).remixed(layer, raw)
        asked = Asked.of(policy, layer, model.super_experts)
        prepared.append((row, raw, mixed, asked, choice_scores(mixed, router, asked)))
    groups: dict[ExpertBudget, list[int]] = {}
    for index, (row, *_) in enumerate(prepared):
        budget = row.request.policy.budget
        if budget is not None and row.decodes and not row.weak:
            groups.setdefault(budget, []).append(index)
    shared = {
        budget: shared_experts(budget, [prepared[i][2] for i in own], [prepared[i][4] for i in own])
        for budget, own in groups.items()
    }
    routes = []
    for row, raw, mixed, asked, _ in prepared:
        policy = row.request.policy
        if row.weak:
            assert policy.contrast is not None
            routes.append(weak_route(raw, router, policy.contrast.weak_rank))
        else:
            budget = policy.budget if row.decodes else None
            routes.append(route(raw, mixed, router, asked, shared[budget] if budget else None))
    return routes, {index for index, each in enumerate(routes) if each.margin <= TIE}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_steps_of_random_policies(seed: int) -> None:
    rng = random.Random(seed)
    model = drawn_model(rng)
    step = Step(drawn_requests(rng, model))
    shape, device = model.shape, torch.device("cpu")
    profile = SimpleNamespace(super_experts=model.super_experts, references={})
    live = BatchExperts(shape, profile, device)
    for index, request in enumerate(step.requests):
        if not request.policy.empty:
            live.add(str(index), request.policy, request.prompt, lambda: torch.zeros(1))
    experts = live.step(
        [str(index) for index in range(len(step.requests))],
        np.array(step.owners),
        step.segments,
        np.array([r.computed for r in step.requests]),
        np.array([r.scheduled for r in step.requests]),
        np.array(step.first_rows),
    )
    if experts is None:
        assert all(request.policy.empty for request in step.requests)
        return
    router = ExpertRouter(model.specs, shape, device)
    router.begin(experts)
    ran = np.zeros((len(step.rows), 3), dtype=np.int64)
    loaded, open_rows = 0, False
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    for moe_index in range(len(shape.layers)):
        # Rows may leave a layer out.
        part = rng.choice([1.0, 0.6])
        tokens = np.flatnonzero([rng.random() < part for _ in step.rows])
        if not len(tokens):
            continue
        logits = torch.randn(len(tokens), shape.experts, generator=generator)
        spec = model.specs[moe_index]
        scores = plain_scores(logits, spec.sigmoid)

        def stock(scores: torch.Tensor = scores, spec: RouterSpec = spec) -> tuple:
            choice = selection_scores(scores, spec)
            ids = choice.topk(spec.top_k, dim=-1).indices
            weights = scores.gather(1, ids)
            if spec.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
            return weights * spec.scale, ids.to(torch.int32)

        router.enter(tokens)
        weights, ids = router.route(moe_index, logits, stock)
        rows = [step.rows[token] for token in tokens]
        routes, unsure = expected(model, moe_index, rows, scores)
        open_rows |= bool(unsure) or any(row.request.policy.budget for row in rows)
        seen: set[int] = set()
        for index, (row, wanted) in enumerate(zip(rows, routes, strict=True)):
            found: dict[int, float] = {}
            for expert, weight in zip(ids[index].tolist(), weights[index].tolist(), strict=True):
                found[expert] = found.get(expert, 0.0) + weight
            usual = stock_selection(scores[index].tolist(), model.router(moe_index))
            ran[tokens[index]] += (len(found), len(usual - found.keys()), 1)
            seen |= found.keys()
            if index not in unsure:
                assert found.keys() == wanted.weights.keys(), (row, found, wanted)
                assert found == pytest.approx(wanted.weights, abs=1e-5)
        loaded += len(seen)
    router.end()
    sums = experts.counts.read()
    assert sums.ran[:, ACTIVE].tolist() == ran[:, 0].tolist()
    assert sums.ran[:, TAKEN].tolist() == ran[:, 1].tolist()
    assert sums.ran[:, ROUTED].tolist() == ran[:, 2].tolist()
    assert sums.loaded == loaded
    assert sums.selections[:, :-2].sum() == ran[:, 0].sum()
    assert sums.selections[:, MASKED].sum() == ran[:, 1].sum()
    assert sums.selections[:, ROWS].sum() == ran[:, 2].sum()
    assert math.isfinite(float(ran.sum()))
    for index in range(len(step.requests)):
        live.remove(str(index))
    assert not any(live._table._row_ids._users[1:])
