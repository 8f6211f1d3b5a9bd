"""Random routers, logits and controls, and what the reference makes of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from support.references.remixes import blended
from support.references.routes import (
    GONE,
    Asked,
    Route,
    Router,
    choice_scores,
    ordered,
    route,
    stock_selection,
    weak_route,
)

from sluice.kernels.dispatch import AUTO
from sluice.kernels.ops.route_topk import route_topk
from sluice.kernels.ops.router_config import EXTRA
from sluice.kernels.ops.routing_args import (
    DROPPED,
    FORCED,
    PROTECTED,
    UNUSED,
    PolicyTable,
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)

EXPERTS = (1, 2, 3, 5, 8, 13, 24, 61, 64, 97)
SPREADS = (0.1, 1.0, 5.0, 12.0)
"""Standard deviations of logits; the largest leaves one or two experts all of the softmax."""

POISON = 1e30
"""In the memory that an operation is about to get: what it does not write is seen."""


@dataclass(frozen=True)
class Pull:
    """A row's re-mix."""

    reference: tuple[float, ...]
    alpha: float
    top: int


@dataclass(frozen=True)
class Selected:
    """What rows dispatch to, and what was counted.

    Attributes:
        weights: fp32, (rows, width).
        ids: int32, (rows, width).
        active: experts of each row.
        taken: selections of the router's own that are not among them, of each row.
        histogram: int64, (experts + 2,).
    """

    weights: torch.Tensor
    ids: torch.Tensor
    active: list[int]
    taken: list[int]
    histogram: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Rows before a router.

    Attributes:
        spec: the model's own router.
        logits: (rows, experts), any dtype, any strides.
        asked: of each row.
        pulls: re-mix of each row, or None.
        shared: experts that a budget leaves all rows, or None.
        ranks: rank of a weak pass's one expert, by row; other rows have None.
        left: rows that are left to the router itself.
    """

    spec: RouterSpec
    logits: torch.Tensor
    asked: tuple[Asked, ...]
    pulls: tuple[Pull | None, ...] = ()
    shared: frozenset[int] | None = None
    ranks: tuple[int | None, ...] = ()
    left: frozenset[int] = frozenset()

    @property
    def router(self) -> Router:
        """The spec in the reference's words."""
        return reference_router(self.spec)

    @property
    def raw(self) -> torch.Tensor:
        """Scores as the router makes them, fp32, (rows, experts)."""
        return self.router.scores(self.logits)

    @property
    def scores(self) -> list[list[float]]:
        """Scores after the re-mix."""
        rows = self.raw.tolist()
        for row, pull in enumerate(self.pulls):
            if pull is not None:
                rows[row] = blended(rows[row], list(pull.reference), pull.alpha, pull.top)
        return rows

    def row(self, index: int) -> Routing:
        """One row on its own."""
        return Routing(
            self.spec,
            self.logits[index : index + 1],
            self.asked[index : index + 1],
            self.pulls[index : index + 1],
            self.shared,
            self.ranks[index : index + 1],
            frozenset({0} if index in self.left else {}),
        )

    def expected(self) -> list[Route]:
        """What the reference makes of each row."""
        routes = []
        for row, (raw, scores) in enumerate(zip(self.raw.tolist(), self.scores, strict=True)):
            rank = self.ranks[row] if self.ranks else None
            if rank is not None:
                routes.append(weak_route(raw, self.router, rank))
            else:
                shared = None if row in self.left else self.shared
                routes.append(route(raw, scores, self.router, self.asked[row], shared))
        return routes

    def stock(self) -> list[set[int]]:
        """What the router selects without controls."""
        return [stock_selection(row, self.router) for row in self.raw.tolist()]

    def selected(
        self, choice: str = AUTO, *, more: int = 0, repeat: bool = True, device: str = "cpu"
    ) -> Selected:
        """What the operation makes of the rows.

        Args:
            choice: which implementation.
            more: slots a row beyond what any can need.
            repeat: how unused slots are filled.
            device: where.
        """
        rows, experts = self.logits.shape
        top_k = self.spec.top_k
        put_back = any(asked.protected for asked in self.asked)
        width = max(asked.top_k or top_k for asked in self.asked) + put_back * top_k
        remixed = [row for row, pull in enumerate(self.pulls) if pull is not None]
        pulls = [pull for pull in self.pulls if pull is not None]
        remix_index = torch.full((rows,), -1, dtype=torch.int32)
        remix_index[remixed] = torch.arange(len(remixed), dtype=torch.int32)
        policies = [0 if row in self.left else row + 1 for row in range(rows)]
        sets = [-1 if self.shared is None or row in self.left else 1 for row in range(rows)]
        members = torch.zeros((2, experts), dtype=torch.bool)
        members[1, sorted(self.shared or ())] = True
        asked = RouteRows(
            policy_index=torch.tensor(policies, dtype=torch.int32),
            token_index=torch.arange(1, rows + 1),
            remix_index=remix_index if remixed else remix_index[:0],
            set_index=torch.tensor([] if self.shared is None else sets, dtype=torch.int32),
        )
        shared = Shared(
            references=torch.tensor([pull.reference for pull in pulls]).view(-1, experts),
            alpha=torch.tensor([pull.alpha for pull in pulls]),
            top=torch.tensor([pull.top for pull in pulls], dtype=torch.int32),
            members=members,
        )
        stock = self._stock() if self.left else Selection.nothing(torch.device("cpu"))
        counts = SelectionCounts(
            histogram=torch.zeros((3, experts + EXTRA), dtype=torch.int64, device=device),
            by_token=torch.zeros((rows + 2, 3), dtype=torch.int64, device=device),
        )
        # Freed at once: what comes next is likely to get the same memory.
        torch.full((rows, width + more), POISON, device=device)
        weights, ids = route_topk.implementation(device, choice)(
            self.logits.to(device),
            asked.to(device),
            shared.to(device),
            policy_table(self.asked, self.ranks, self.spec, experts).to(device),
            self.spec.to(device),
            stock.to(device),
            counts,
            1,
            width + more,
            repeat,
        )
        histogram, by_token = (tensor.cpu() for tensor in counts.tensors)
        assert not histogram[0].any()
        assert not histogram[2].any()
        assert not by_token[0].any()
        assert not by_token[-1].any()
        assert by_token[1:-1, 2].tolist() == [1] * rows
        active, taken = by_token[1:-1, 0].tolist(), by_token[1:-1, 1].tolist()
        assert histogram[1, -2:].tolist() == [rows, sum(taken)]
        return Selected(weights.cpu(), ids.cpu(), active, taken, histogram[1])

    def _stock(self) -> Selection:
        """A selection of the router's own that no other rule would come to."""
        rows = len(self.logits)
        ids = [sorted(usual, reverse=True) for usual in self.stock()]
        weights = torch.arange(1.0, rows + 1).unsqueeze(1).expand(rows, self.spec.top_k)
        return Selection(weights.contiguous(), torch.tensor(ids, dtype=torch.int32))


def reference_router(spec: RouterSpec) -> Router:
    """A spec in the reference's words."""
    correction = tuple(spec.correction.tolist()) or None
    return Router(
        spec.top_k,
        spec.sigmoid,
        spec.renormalize,
        spec.scale,
        spec.groups,
        spec.topk_group,
        correction,
    )


def dispatched(selected: Selected, *, repeat: bool = True) -> list[dict[int, float]]:
    """Weights by expert of every row, unused slots and counts checked on the way."""
    rows = []
    # vLLM's kernels of the experts read memory, not strides.
    assert selected.ids.is_contiguous()
    assert selected.weights.is_contiguous()
    assert selected.ids.dtype == torch.int32
    assert selected.weights.dtype == torch.float32
    assert not selected.weights.isnan().any()
    histogram = [0] * (len(selected.histogram) - EXTRA)
    parts = (selected.ids.tolist(), selected.weights.tolist(), selected.active)
    for ids, weights, active in zip(*parts, strict=True):
        assert 1 <= active <= len(ids)
        chosen = dict(zip(ids[:active], weights[:active], strict=True))
        assert len(chosen) == active, "an expert runs twice"
        assert not any(weights[active:]), "an unused slot has a weight"
        unused = set(ids[active:])
        assert unused <= ({ids[0]} if repeat else {UNUSED}), "an unused slot loads another expert"
        for expert in chosen:
            histogram[expert] += 1
        rows.append(chosen)
    assert selected.histogram[:-EXTRA].tolist() == histogram
    return rows


def policy_table(
    asked: Sequence[Asked], ranks: Sequence[int | None], spec: RouterSpec, experts: int
) -> PolicyTable:
    """The router's own choice, then one policy a row."""
    rows = [Asked(), *asked]
    bias = torch.zeros((len(rows), experts))
    marks = torch.zeros((len(rows), experts), dtype=torch.uint8)
    weights = torch.full((len(rows), experts), math.nan)
    for row, own in enumerate(rows):
        for expert, value in {**own.bias, **dict.fromkeys(own.masked, GONE)}.items():
            bias[row, expert] = value
        for bit, ids in ((DROPPED, own.dropped), (FORCED, own.forced), (PROTECTED, own.protected)):
            marks[row, sorted(ids)] += bit
        for expert, weight in own.forced.items():
            weights[row, expert] = math.nan if weight is None else weight
    changes = (bias != 0).any(-1) | (marks != 0).any(-1)
    kept = [-1 if rank is None else rank for rank in (None, *(ranks or [None] * len(asked)))]
    k = [row.top_k or spec.top_k for row in rows]
    cuts = [(row.skip_ratio or 0.0, math.inf if row.top_p is None else row.top_p) for row in rows]
    limits = torch.tensor([*zip(k, kept, changes.tolist(), strict=True)], dtype=torch.int32)
    return PolicyTable(limits, torch.tensor(cuts), bias, marks, weights)


def some_router(rng: random.Random) -> tuple[RouterSpec, int]:
    """A router and its number of experts."""
    experts = rng.choice(EXPERTS)
    groups = rng.choice([g for g in (1, 1, 2, 3, 4, 8) if experts % g == 0])
    topk_group = rng.randint(1, groups)
    reach = topk_group * (experts // groups)
    corrected = groups > 1 and rng.random() < 0.5
    spec = RouterSpec(
        top_k=rng.choice([1, reach, rng.randint(1, min(reach, 8))]),
        scoring=rng.choice(["softmax", "sigmoid"]),
        renormalize=rng.random() < 0.5,
        scale=rng.choice([1.0, 1.0, 2.5]),
        groups=groups,
        topk_group=topk_group,
        correction=torch.empty(experts).normal_(0.0, 0.1, generator=_seeded(rng))
        if corrected
        else torch.empty(0),
    )
    return spec, experts


def some_asked(rng: random.Random, spec: RouterSpec, experts: int, *, budget: bool) -> Asked:
    """Controls that leave a row what it needs, as the server sees to it."""
    size = experts // spec.groups
    reach = spec.topk_group * size
    top_k = rng.choice([None, None, 1, reach, rng.randint(1, reach)])
    wanted = top_k or spec.top_k
    free = list(range(experts))
    rng.shuffle(free)

    def take(most: int, pool: Sequence[int]) -> list[int]:
        return list(pool[: rng.randint(0, most)]) if most > 0 and rng.random() < 0.5 else []

    home = rng.sample(range(spec.groups), spec.topk_group)
    forced = take(min(wanted, 3), [e for e in free if e // size in home])
    # Any groups that a row may end up with hold as many live experts as it wants.
    live = max(math.ceil(wanted / spec.topk_group), min(2, size))
    masked: list[int] = []
    for group in range(spec.groups):
        pool = [e for e in free if e // size == group and e not in forced]
        masked += take(min(size - live, len(pool)), pool)
    rest = [e for e in free if e not in {*forced, *masked}]
    dropped = [] if budget else take(min(wanted - 1, 3), rest)
    rest = [e for e in rest if e not in dropped]
    weight = (None, 0.3, 1.5)
    return Asked(
        masked=frozenset(masked),
        dropped=frozenset(dropped),
        forced={e: rng.choice(weight) for e in forced},
        bias={e: rng.choice([-0.4, 0.05, 0.3]) for e in take(4, rest)},
        top_k=top_k,
        skip_ratio=rng.choice([None, 0.2, 0.6, 1.0]),
        top_p=rng.choice([None, 0.0, 0.3, 0.8]),
        protected=frozenset(take(3, rng.sample(rest, len(rest)))),
    )


def _seeded(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(32))


def some_logits(rng: random.Random, spec: RouterSpec, rows: int, experts: int) -> torch.Tensor:
    """Router logits."""
    spread = rng.choice(SPREADS)
    if spec.sigmoid:
        # Far out, sigmoids are 1 and tie.
        spread = min(spread, 2.0)
    return spread * torch.randn(rows, experts, generator=_seeded(rng))


def some_pull(rng: random.Random, experts: int) -> Pull:
    """A re-mix."""
    reference = [rng.random() for _ in range(experts)]
    return Pull(tuple(reference), rng.choice([0.0, 0.3, 1.0]), rng.randint(1, experts))


def routings(**kinds: bool) -> st.SearchStrategy[Routing]:
    """Random rows before a random router; see `random_routing`."""
    return st.integers(0, 2**32).map(lambda seed: random_routing(seed, **kinds))


def random_routing(
    seed: int, *, controls: bool = True, budget: bool = False, remix: bool = True
) -> Routing:
    """Rows of one seed, with or without controls, a shared set and other scores than their own."""
    rng = random.Random(seed)
    spec, experts = some_router(rng)
    rows = rng.choice([1, 2, 3, 7, 11])
    logits = some_logits(rng, spec, rows, experts)
    asked = [Asked()] * rows
    if controls:
        distinct = rng.choice([1, rows])
        drawn = [some_asked(rng, spec, experts, budget=budget) for _ in range(distinct)]
        asked = [drawn[row % distinct] for row in range(rows)]
    pulls: tuple[Pull | None, ...] = (None,) * rows
    if remix and rng.random() < 0.3:
        pulls = tuple(rng.choice([None, some_pull(rng, experts)]) for _ in range(rows))
    left: set[int] = set()
    # Rows that are left to the router among those with controls, as a mixed batch has them.
    if controls and rng.random() < 0.5:
        free = [row for row in range(rows) if pulls[row] is None]
        left = {row for row in free if rng.random() < 0.3}
        asked = [Asked() if row in left else own for row, own in enumerate(asked)]
    routing = Routing(spec, logits, tuple(asked), pulls, left=frozenset(left))
    if not budget:
        return routing
    members = set(rng.sample(range(experts), rng.randint(0, experts)))
    for own, each in zip(routing.scores, asked, strict=True):
        members.add(ordered(choice_scores(own, routing.router, each))[0])
    return replace(routing, shared=frozenset(members))
