"""Random routers, logits and controls, and what the reference makes of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from references.routes import GONE, Asked, Route, Router, choice_scores, ordered, route

from sluice.kernels.route_topk import RouterSpec, RowControls, Selection, select, selection_scores

EXPERTS = (1, 2, 3, 5, 8, 13, 24, 61, 64, 97)
SPREADS = (0.1, 1.0, 5.0, 12.0)
"""Standard deviations of logits; the largest leaves one or two experts all of the softmax."""


@dataclass(frozen=True)
class Routing:
    """Rows before a router.

    Attributes:
        spec: the model's own router.
        raw: fp32, (rows, experts): scores as the router made them.
        scores: the same or other ones, as a re-mix leaves them.
        asked: of each row.
        shared: experts that a budget leaves all rows, or None.
    """

    spec: RouterSpec
    raw: torch.Tensor
    scores: torch.Tensor
    asked: tuple[Asked, ...]
    shared: frozenset[int] | None = None

    @property
    def router(self) -> Router:
        """The spec in the reference's words."""
        spec = self.spec
        correction = None if spec.correction is None else tuple(spec.correction.tolist())
        return Router(
            spec.top_k,
            spec.scoring == "sigmoid",
            spec.renormalize,
            spec.scale,
            spec.groups,
            spec.topk_group,
            correction,
        )

    def row(self, index: int) -> Routing:
        """One row on its own."""
        one = slice(index, index + 1)
        own = (self.asked[index],)
        return Routing(self.spec, self.raw[one], self.scores[one], own, self.shared)

    def expected(self) -> list[Route]:
        """What the reference makes of each row."""
        rows = zip(self.raw.tolist(), self.scores.tolist(), self.asked, strict=True)
        return [route(raw, scores, self.router, asked, self.shared) for raw, scores, asked in rows]

    def stock(self) -> list[set[int]]:
        """What the router selects without controls."""
        choice = selection_scores(self.raw, self.spec)
        return [set(row) for row in choice.topk(self.spec.top_k, dim=-1).indices.tolist()]

    def selected(self, *, explicit: bool = False) -> Selection:
        """What the kernel makes of the rows; `explicit` spells neutral controls out."""
        controls = row_controls(self.asked, self.spec, self.raw.shape[1], explicit=explicit)
        stock_choice = choice = selection_scores(self.raw, self.spec)
        remixed = self.scores is not self.raw
        if remixed or controls.bias is not None or controls.forced is not None:
            choice = selection_scores(self.scores, self.spec, controls)
        if self.shared is not None:
            open_to = torch.tensor(
                [
                    [e in {*self.shared, *asked.forced, *({*asked.protected} & usual)} for e in row]
                    for row, asked, usual in zip(
                        [range(self.raw.shape[1])] * len(self.raw),
                        self.asked,
                        self.stock(),
                        strict=True,
                    )
                ]
            )
            choice = choice.masked_fill(~open_to, GONE)
        return select(
            self.scores,
            choice,
            stock_choice,
            self.spec,
            controls,
            starving=self.shared is not None,
        )


def row_controls(
    asked: Sequence[Asked], spec: RouterSpec, experts: int, *, explicit: bool = False
) -> RowControls:
    """Controls of rows; `explicit` spells neutral ones out."""
    k = torch.tensor([[row.top_k or spec.top_k] for row in asked])
    alike = len(asked) > 1 and all(row == asked[0] for row in asked)
    rows = asked[:1] if alike else asked

    def table(fill: float | bool, entries: Sequence[dict[int, float | bool]]) -> torch.Tensor:
        made = torch.full((len(rows), experts), fill)
        for row, own in zip(made, entries, strict=True):
            for expert, value in own.items():
                row[expert] = value
        return made

    bias = [{**row.bias, **dict.fromkeys(row.masked, GONE)} for row in rows]
    dropped = [dict.fromkeys(row.dropped, True) for row in rows]
    forced = [dict.fromkeys(row.forced, True) for row in rows]
    weights = [{e: math.nan if w is None else w for e, w in row.forced.items()} for row in rows]
    protected = [dict.fromkeys(row.protected, True) for row in rows]
    ratio = [[row.skip_ratio or 0.0] for row in rows]
    top_p = [[math.inf if row.top_p is None else row.top_p] for row in rows]
    any_forced = explicit or any(forced)
    return RowControls(
        k=k[:1] if alike else k,
        most=int(k.max()),
        uniform=bool((k == k[0]).all()) and not explicit,
        bias=table(0.0, bias) if explicit or any(bias) else None,
        dropped=table(False, dropped) if explicit or any(dropped) else None,
        forced=table(False, forced) if any_forced else None,
        forced_weight=table(math.nan, weights) if any_forced else None,
        ratio=torch.tensor(ratio) if explicit or max(ratio) > [0.0] else None,
        top_p=torch.tensor(top_p) if explicit or min(top_p) < [math.inf] else None,
        protected=table(False, protected) if explicit or any(protected) else None,
    )


def some_router(rng: random.Random) -> tuple[RouterSpec, int]:
    """A router and its number of experts."""
    experts = rng.choice(EXPERTS)
    groups = rng.choice([g for g in (1, 1, 2, 3, 4, 8) if experts % g == 0 and experts // g > 1]
                        or [1])  # fmt: skip
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
        else None,
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


def some_scores(rng: random.Random, spec: RouterSpec, rows: int, experts: int) -> torch.Tensor:
    spread = rng.choice(SPREADS)
    if spec.scoring == "sigmoid":
        # Far out, sigmoids are 1 and tie.
        spread = min(spread, 2.0)
    logits = spread * torch.randn(rows, experts, generator=_seeded(rng))
    return logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()


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
    raw = scores = some_scores(rng, spec, rows, experts)
    if remix and rng.random() < 0.3:
        scores = 0.3 * raw + 0.7 * some_scores(rng, spec, rows, experts)
    asked = [Asked()] * rows
    if controls:
        distinct = rng.choice([1, rows])
        drawn = [some_asked(rng, spec, experts, budget=budget) for _ in range(distinct)]
        asked = [drawn[row % distinct] for row in range(rows)]
        # Rows without controls among those with some, as a mixed batch has them.
        if distinct > 1:
            asked = [Asked() if rng.random() < 0.2 else row for row in asked]
    shared = None
    if budget:
        members = set(rng.sample(range(experts), rng.randint(0, experts)))
        for own, row in zip(scores.tolist(), asked, strict=True):
            router = Routing(spec, raw, scores, tuple(asked)).router
            members.add(ordered(choice_scores(own, router, row))[0])
        shared = frozenset(members)
    return Routing(spec, raw, scores, tuple(asked), shared)
