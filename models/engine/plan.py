"""What one engine step runs: for every sub-layer, which token rows execute it.

Rows are the tokens of a vLLM step in one dimension, request after request. A request's tokens come
as segments, runs of tokens with one mask. A `StepPlan` depends on the segments only, not on the
lengths of sequences: a batch that decodes keeps its plan from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sluice.models.depth.masks import Segment
from sluice.models.policy.axes import ATTENTION, MLP, BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class Rows:
    """A set of token rows that run one sub-layer together, as runs of adjacent tokens.

    A run is what attention takes for a sequence: its queries are adjacent positions. A request
    has several runs where tokens between them are left out.

    Attributes:
        tokens: row indices, ascending, int64, (rows,).
        requests: batch index of each run, int64, (runs,).
        lengths: rows of each run, int64, (runs,).
        trailing: tokens of the request in this step after the run, int64, (runs,).
        everything: all token rows of the step are here.
    """

    tokens: IntArray
    requests: IntArray
    lengths: IntArray
    trailing: IntArray
    everything: bool
    _indices: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def index(self, device: torch.device) -> torch.Tensor:
        """`tokens` on `device`, for gather and scatter; copied there once per plan."""
        if device not in self._indices:
            self._indices[device] = torch.from_numpy(self.tokens).to(device)
        return self._indices[device]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Whose tokens the rows of a step are.

    Attributes:
        requests: batch index of each row, int64, (tokens,).
        ends: one past the last row of each request, int64, (requests,).
        scheduled: the rows that vLLM scheduled, in its order, int64; the others are pending or
            a weak pass's.
    """

    requests: IntArray
    ends: IntArray
    scheduled: IntArray
    _interned: dict[bytes, Rows] = field(default_factory=dict, repr=False)

    @property
    def pending(self) -> bool:
        """Whether there are rows that vLLM did not schedule."""
        return len(self.scheduled) < len(self.requests)

    @property
    def one_row_each(self) -> bool:
        """Whether every request has one row: a step that only decodes."""
        return not self.pending and len(self.requests) == len(self.ends)

    def rows(self, chosen: BoolArray) -> Rows:
        """The chosen rows, one object per set. `chosen`: bool, (tokens,)."""
        key = chosen.tobytes()
        if key not in self._interned:
            self._interned[key] = self._build(chosen)
        return self._interned[key]

    def forked(self) -> StepShape:
        """This shape for one step: row sets that are made from it do not outlive the step."""
        return replace(self, _interned=dict(self._interned))

    @property
    def everything(self) -> Rows:
        """All rows."""
        return self.rows(np.ones(len(self.requests), dtype=np.bool_))

    @property
    def nothing(self) -> Rows:
        """No rows."""
        return self.rows(np.zeros(len(self.requests), dtype=np.bool_))

    def chosen(self, rows: Rows) -> BoolArray:
        """Inverse of `rows`: bool, (tokens,)."""
        chosen = np.zeros(len(self.requests), dtype=np.bool_)
        chosen[rows.tokens] = True
        return chosen

    def union(self, first: Rows, second: Rows) -> Rows:
        """Rows that are in either."""
        return self.rows(self.chosen(first) | self.chosen(second))

    def contains(self, outer: Rows, inner: Rows) -> bool:
        """Whether `outer` has every row of `inner`."""
        return outer is inner or not (self.chosen(inner) & ~self.chosen(outer)).any()

    def _build(self, chosen: BoolArray) -> Rows:
        tokens = np.flatnonzero(chosen)
        requests = self.requests[tokens]
        begins = np.ones(len(tokens), dtype=np.bool_)
        begins[1:] = (np.diff(tokens) != 1) | (np.diff(requests) != 0)
        starts = np.flatnonzero(begins)
        lengths = np.diff(np.append(starts, len(tokens)))
        last = tokens[starts + lengths - 1]
        return Rows(
            tokens=tokens,
            requests=requests[starts],
            lengths=lengths,
            trailing=self.ends[requests[starts]] - last - 1,
            everything=len(tokens) == len(self.requests),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Rows that run a sub-layer, and those among them whose output is dropped.

    Attributes:
        rows: that run.
        dropped: places within `rows`, int64; such a row keeps the state it had.
    """

    rows: Rows
    dropped: IntArray
    _kept: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def kept(self, device: torch.device) -> torch.Tensor | None:
        """Whose output stays, bool, (rows, 1); None if everybody's. Made once per plan."""
        if not len(self.dropped):
            return None
        if device not in self._kept:
            kept = np.ones((len(self.rows), 1), dtype=np.bool_)
            kept[self.dropped] = False
            self._kept[device] = torch.from_numpy(kept).to(device)
        return self._kept[device]

    @classmethod
    def keeping(cls, rows: Rows, wanted: Rows) -> Work:
        """Run `rows`, which contain the `wanted` ones, and drop the others."""
        if rows is wanted:
            return cls(rows, np.empty(0, dtype=np.int64))
        return cls(rows, np.flatnonzero(~np.isin(rows.tokens, wanted.tokens)))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which rows need which part of a layer, and which rows run it.

    Attributes:
        attention: rows that attend.
        fill: rows that only write K/V.
        mlp: rows that run the MLP.
        attend: rows run through the attention: those that attend, and maybe others.
        writes: rows of `attend` that write K/V.
        separate_fill: rows whose K/V are written on their own.
        run_mlp: rows run through the MLP.
    """

    attention: Rows
    fill: Rows
    mlp: Rows
    attend: Work
    writes: Rows
    separate_fill: Rows
    run_mlp: Work


class LayerNeeds(NamedTuple):
    """Which rows need which part of a layer: they attend, only write K/V, run the MLP."""

    attention: Rows
    fill: Rows
    mlp: Rows


class LayerPlanner(Protocol):
    """Chooses how layers are run; `sluice.models.engine.cost_model` and `compact` do."""

    def __call__(self, shape: StepShape, needs: Sequence[LayerNeeds]) -> list[LayerPlan]:
        """Plan layers that follow each other, for the rows that need their parts."""


def compact(shape: StepShape, needs: Sequence[LayerNeeds]) -> list[LayerPlan]:  # noqa: ARG001
    """Run exactly the rows that need it."""
    plans = {
        each: LayerPlan(
            *each,
            attend=Work.keeping(each.attention, each.attention),
            writes=each.attention,
            separate_fill=each.fill,
            run_mlp=Work.keeping(each.mlp, each.mlp),
        )
        for each in set(needs)
    }
    return [plans[each] for each in needs]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The whole step.

    Attributes:
        shape: whose rows they are.
        layers: one entry per layer.
        full_depth: no row skips anything: the stock forward serves this step.
    """

    shape: StepShape
    layers: tuple[LayerPlan, ...]
    full_depth: bool


def build_plan(
    segments: Sequence[Segment],
    requests: int,
    skip: BoolArray,
    fill: BoolArray,
    plan_layers: LayerPlanner = compact,
) -> StepPlan:
    """Plan a step.

    Args:
        segments: in batch order; the segments of a request in the order of its tokens.
        requests: number of requests in the step.
        skip: the mask table's, (masks, layers, 2 modules).
        fill: the mask table's, (masks, layers).
        plan_layers: chooses how they are run.
    """
    owners, masks, lengths = (
        np.array([getattr(s, name) for s in segments], dtype=np.int64)
        for name in ("request", "mask", "length")
    )
    tokens = np.repeat(owners, lengths)
    shape = StepShape(
        requests=tokens,
        ends=np.cumsum(np.bincount(tokens, minlength=requests)),
        scheduled=np.flatnonzero(~np.repeat([s.pending or s.weak for s in segments], lengths)),
    )
    skips, fills = skip[masks], fill[masks]
    sets: dict[bytes, LayerNeeds] = {}

    def needs(own_skips: BoolArray, own_fills: BoolArray) -> LayerNeeds:
        key = own_skips.tobytes() + own_fills.tobytes()
        if key not in sets:
            chosen = (~own_skips[:, ATTENTION], own_fills, ~own_skips[:, MLP])
            sets[key] = LayerNeeds(*(shape.rows(np.repeat(rows, lengths)) for rows in chosen))
        return sets[key]

    layers = [needs(skips[:, index], fills[:, index]) for index in range(skip.shape[1])]
    return StepPlan(shape, tuple(plan_layers(shape, layers)), not skips.any())
