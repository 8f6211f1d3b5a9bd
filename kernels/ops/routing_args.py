"""What the routing operations are told about rows: their policies, and what a step shares.

Each class is one argument of `route_topk`; what nobody asks for is an empty tensor. Columns and
bits are named in `sluice.kernels.ops.routing_args`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

if TYPE_CHECKING:
    _Tensors = Iterable[torch.Tensor]
else:
    _Tensors = object
from dataclasses import dataclass

import torch

Group = Sequence[torch.Tensor]
"""What an operator's signature calls these."""


class _Group(_Tensors):
    """Tensors that go into a call together."""

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        """The same as numpy arrays of the same memory, for a CPU's operations.

        Made once: asking twenty tensors for theirs costs more than routing twenty rows.
        """
        return tuple(tensor.numpy() for tensor in self)


class _PolicyTable(NamedTuple):
    limits: torch.Tensor
    cuts: torch.Tensor
    bias: torch.Tensor
    marks: torch.Tensor
    forced_weight: torch.Tensor


class PolicyTable(_PolicyTable, _Group):
    """Controls of distinct policies in one layer; row 0 is the router's own choice.

    Attributes:
        limits: int32, (policies, 3): experts per token; the rank of the one expert of a weak pass
            (SCMoE), or -1; whether `bias` or `marks` say anything.
        cuts: fp32, (policies, 2): least share of the first rank's score, 0 cuts nothing; share of
            the scores that the ranks before one may have, inf cuts nothing.
        bias: fp32, (policies, experts), added to selection scores; -inf masks.
        marks: uint8, (policies, experts): taken out of what was selected, always selected, put
            back if the router's own choice has it.
        forced_weight: fp32, (policies, experts): of what is always selected; NaN is the mean of
            the row's others.
    """


class _RouteRows(NamedTuple):
    policies: torch.Tensor
    owners: torch.Tensor
    pulls: torch.Tensor
    sets: torch.Tensor


class RouteRows(_RouteRows, _Group):
    """What each row asks.

    Attributes:
        policies: int32, (rows,): row of the policy table.
        owners: int64, (rows,): token of the step, -1 for a row whose output is dropped.
        pulls: int32, (rows,): row of the references, -1 for none. Or (0,).
        sets: int32, (rows,): row of the shared sets, -1 for none. Or (0,).
    """


class _Shared(NamedTuple):
    references: torch.Tensor
    alpha: torch.Tensor
    top: torch.Tensor
    within: torch.Tensor


class Shared(_Shared, _Group):
    """What rows refer to beside the policy table.

    Attributes:
        references: fp32, (references, experts), >= 0, any mass: probabilities that rows are
            pulled towards (C3PO).
        alpha: fp32, (references,): share of the row's own scores, in [0, 1].
        top: int32, (references,): how many of the row's best experts take part.
        within: bool, (sets, experts): experts of a set that rows share (batch budgets).
    """

    @classmethod
    def nothing(cls, experts: int, device: torch.device) -> Self:
        """No references and no sets."""
        references = torch.empty((0, experts), device=device)
        return cls(
            references=references,
            alpha=references.new_empty(0),
            top=references.new_empty(0, dtype=torch.int32),
            within=references.new_empty((0, experts), dtype=torch.bool),
        )


class _RouteCounts(NamedTuple):
    histogram: torch.Tensor
    ran: torch.Tensor


class RouteCounts(_RouteCounts, _Group):
    """Where routing is counted; written to.

    Attributes:
        histogram: int64, (layers, experts + 2): rows of each expert, then two more columns.
        ran: int64, (tokens, 3): experts run, selections of the router's own that were not, layers
            routed. Or (0, 3): not counted by token.
    """


K, RANK, CHANGES = range(3)
"""Columns of `PolicyTable.limits`."""

RATIO, TOP_P = range(2)
"""Columns of `PolicyTable.cuts`."""

DROPPED, FORCED, PROTECTED = 1, 2, 4
"""Bits of `PolicyTable.marks`."""

EXTRA = 2
ROWS, MASKED = -2, -1
"""Columns of a histogram after the experts': rows routed, selections that a policy took away."""

ACTIVE, TAKEN, ROUTED = range(3)
"""Columns of what tokens ran: experts, selections that the policy took away, layers routed."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router before any control.

    Attributes:
        top_k: experts per token.
        scoring: `softmax` or `sigmoid`.
        renormalize: selected weights are scaled to sum to 1.
        scale: factor on all weights.
        groups: expert groups, 1 for none; group-limited selection as in DeepSeek-V2 and -V3.
        topk_group: groups that a row may choose from.
        correction: fp32, (experts,), added to selection scores only, or None.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    topk_group: int = 1
    correction: torch.Tensor | None = None

    @property
    def numbers(self) -> tuple[int, bool, bool, float, int, int]:
        """As `route_topk` takes them: `top_k` to `topk_group`."""
        rest = (self.renormalize, self.scale, self.groups, self.topk_group)
        return (self.top_k, self.sigmoid, *rest)

    @property
    def score_numbers(self) -> tuple[bool, int, int]:
        """As `router_scores` takes them: `sigmoid` to `topk_group`."""
        return (self.sigmoid, self.groups, self.topk_group)

    @property
    def sigmoid(self) -> bool:
        """Whether scores are the sigmoid of the logits instead of their softmax."""
        return self.scoring == "sigmoid"

    @property
    def corrections(self) -> torch.Tensor:
        """`correction`, or an empty tensor."""
        return torch.empty(0) if self.correction is None else self.correction
