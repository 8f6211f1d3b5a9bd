"""Cases of the operations on router logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sluice.kernels.bench.agreement import routes
from sluice.kernels.bench.cases.case import Case, nbytes
from sluice.kernels.bench.cases.counterparts import stock_routes
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.ops.batch_budget import LYNX, OEA, XSHARE, batch_budget
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_config import EXTRA
from sluice.kernels.ops.router_scores import router_scores
from sluice.kernels.ops.routing_args import (
    CHANGES,
    FORCED,
    PROTECTED,
    RATIO,
    TOP_P,
    K,
    PolicyTable,
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
)

POLICIES = 8
"""Distinct policies in a step with controls."""
_BUDGETS = (("OEA", OEA, 4), ("XShare", XSHARE, 32), ("Lynx", LYNX, 32))


@dataclass(frozen=True)
class _Rows:
    """Rows before a router that nobody controls."""

    shapes: Shapes
    rows: int

    @property
    def width(self) -> int:
        """Slots a row."""
        return self.shapes.top_k

    @property
    def spec(self) -> RouterSpec:
        """The model's own router."""
        return RouterSpec(self.shapes.top_k).to(self.shapes.device)

    @cached_property
    def generator(self) -> torch.Generator:
        """What everything random here is drawn from."""
        return self.shapes.generator(self.rows)

    @cached_property
    def logits(self) -> torch.Tensor:
        """A normal distribution's quantiles, shuffled in each row: logits without a tie."""
        count = self.shapes.experts
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        values: torch.Tensor = 2.0 * torch.special.ndtri(steps)
        order = self._drawn(self.rows, count).argsort(-1)
        return values.float().to(self.shapes.device)[order]

    @cached_property
    def asked(self) -> RouteRows:
        """Nothing: all rows have the router's own policy."""
        none = self._index([])
        return RouteRows(self._index([0] * self.rows), self.token_index, none, none)

    @cached_property
    def token_index(self) -> torch.Tensor:
        """Each row is its token's."""
        return torch.arange(self.rows, device=self.shapes.device)

    @cached_property
    def shared(self) -> Shared:
        """Nothing."""
        return Shared.nothing(self.shapes.experts, self.shapes.device)

    @cached_property
    def table(self) -> PolicyTable:
        """The router's own policy and nothing else."""
        return self._table(1)

    @cached_property
    def counts(self) -> SelectionCounts:
        """A histogram; nothing is counted by token."""
        return self._counts(0)

    @cached_property
    def selection(self) -> torch.Tensor:
        """What rows select by, fp32, (rows, experts)."""
        return self.scores[1]

    @cached_property
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and selection scores."""
        return router_scores.reference(*self.score_args)

    @property
    def score_args(self) -> tuple[torch.Tensor, RouteRows, Shared, PolicyTable, RouterSpec]:
        """Arguments of `router_scores`."""
        return self.logits, self.asked, self.shared, self.table, self.spec

    def route(self, setting: str) -> Case:
        """A case of `route_topk`."""
        counts = self.counts
        stock = Selection.nothing(self.shapes.device)
        repeat = self.shapes.device.type == "cpu"
        args = (*self.score_args, stock, counts, 0, self.width, repeat)
        read = nbytes(self.logits, self.asked, self.shared, self.table, counts)
        if not counts.by_token.numel():
            # Tokens only matter where they are counted.
            read -= nbytes(self.asked.token_index)
        written = nbytes(counts) + self.rows * self.width * 8
        return Case(
            route_topk,
            self.rows,
            args,
            read + written,
            setting,
            mutated=(6,),
            agreement=routes(self.selection),
        )

    def _counts(self, tokens: int) -> SelectionCounts:
        histogram = self._blank(1, self.shapes.experts + EXTRA).long()
        return SelectionCounts(histogram, self._blank(tokens, 3).long())

    def _table(self, policies: int) -> PolicyTable:
        experts = self.shapes.experts
        cuts = self._blank(policies, 2)
        cuts[:, TOP_P] = math.inf
        bias, marks = self._blank(policies, experts), self._blank(policies, experts).to(torch.uint8)
        limits = self._index([self.shapes.top_k, -1, 0]).repeat(policies, 1)
        return PolicyTable(limits, cuts, bias, marks, torch.full_like(bias, math.nan))

    def _blank(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, device=self.shapes.device)

    def _index(self, index: list[int]) -> torch.Tensor:
        return torch.tensor(index, dtype=torch.int32, device=self.shapes.device)

    def _drawn(self, *size: int) -> torch.Tensor:
        return torch.rand(size, generator=self.generator, device=self.shapes.device)


class _Controlled(_Rows):
    """Each row has one of `POLICIES` policies: masks, biases, a forced and two protected experts.

    Every other policy cuts by ratio and share and runs half of the experts.
    """

    @property
    def width(self) -> int:
        """Protected experts come on top."""
        return 2 * self.shapes.top_k

    @cached_property
    def asked(self) -> RouteRows:
        """Policies in turn."""
        policies = [1 + row % POLICIES for row in range(self.rows)]
        none = self._index([])
        return RouteRows(self._index(policies), self.token_index, none, none)

    @cached_property
    def table(self) -> PolicyTable:
        """Random controls after the router's own."""
        experts, top_k = self.shapes.experts, self.shapes.top_k
        table = self._table(1 + POLICIES)
        masked = experts // 8
        for policy in range(1, 1 + POLICIES):
            order = self._drawn(experts).argsort()
            table.bias[policy, order[:masked]] = -math.inf
            table.bias[policy, order[masked : masked + 4]] = 0.05
            table.marks[policy, order[masked + 4]] = FORCED
            table.marks[policy, order[masked + 5 : masked + 7]] = PROTECTED
            if policy % 2 == 0:
                table.limits[policy, K] = top_k // 2
                table.cuts[policy, RATIO], table.cuts[policy, TOP_P] = 0.1, 0.8
        table.limits[1:, CHANGES] = 1
        return table

    @cached_property
    def counts(self) -> SelectionCounts:
        """Counted by token as well."""
        return self._counts(self.rows)


class _Everything(_Controlled):
    """The same, with every other row re-mixed and all rows limited to one of two sets."""

    @cached_property
    def asked(self) -> RouteRows:
        """Rows with a policy that cuts nothing are re-mixed."""
        rows = range(self.rows)
        return replace(
            super().asked,
            remix_index=self._index([-1 if row % 2 else row % POLICIES for row in rows]),
            set_index=self._index([row // 2 % 2 for row in rows]),
        )

    @cached_property
    def shared(self) -> Shared:
        """A reference for each policy, and half of the experts in each set."""
        experts = self.shapes.experts
        alpha = self._blank(POLICIES) + 0.5
        members = self._drawn(2, experts) < 0.5
        top = self._index([20] * POLICIES)
        return Shared(self._drawn(POLICIES, experts), alpha, top, members)


def route_topk_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Routing without a control, with policies, and with all there is."""
    neutral = _Rows(shapes, rows)
    stock = stock_routes(neutral.logits, shapes.top_k, neutral.selection)
    return (
        replace(neutral.route("neutral"), counterparts=stock),
        _Controlled(shapes, rows).route("policies"),
        _Everything(shapes, rows).route("all controls"),
    )


def router_scores_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Scores of rows with policies."""
    routed = _Controlled(shapes, rows)
    # Of the policies' controls it reads biases and marks.
    table = (routed.table.bias, routed.table.marks)
    read = nbytes(routed.logits, routed.asked.policy_index, table)
    return (Case(router_scores, rows, routed.score_args, read + nbytes(routed.scores)),)


def batch_budget_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Shared sets of the three methods."""
    scores, choice = _Controlled(shapes, rows).scores
    return tuple(
        Case(
            batch_budget,
            rows,
            (choice, scores, method, size),
            nbytes((choice,) if method == OEA else (choice, scores)) + shapes.experts,
            setting,
        )
        for setting, method, size in _BUDGETS
    )


def count_selections_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Selections of a router, counted by expert and by token."""
    routed = _Controlled(shapes, rows)
    ids = routed.selection.topk(shapes.top_k, dim=-1).indices.int()
    counts = routed.counts
    return (
        Case(
            count_selections,
            rows,
            (ids, routed.token_index, counts, 0),
            nbytes(ids, routed.token_index) + 2 * nbytes(counts),
            mutated=(2,),
        ),
    )
