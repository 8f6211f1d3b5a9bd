"""The arguments of the routing operations, in named groups, and the columns and bits in them.

A step builds the groups once and its layers share them: what the rows ask (`RouteRows`), what rows
refer to beside their policies (`Shared`), the policies of a layer (`PolicyTable`), the layer's
router (`RouterSpec`), what the router selects by itself (`Selection`), and where selections are
counted (`SelectionCounts`). What no row asks for is an empty tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch

from sluice.kernels.ops.router_config import RouterConfig

K, RANK, CHANGES = range(3)
"""Columns of `PolicyTable.limits`."""

RATIO, TOP_P = range(2)
"""Columns of `PolicyTable.cuts`."""

DROPPED, FORCED, PROTECTED = 1, 2, 4
"""Bits of `PolicyTable.marks`."""

UNUSED = -1
"""Id of an unused slot where the kernel of the experts leaves invalid ids out."""

SMALLEST = torch.finfo(torch.float32).tiny
"""Least score of an expert that is renormalised: those of no score share alike."""


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """Tensors that go into a call together."""

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in the order of the attributes."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @cached_property
    def arrays(self) -> Any:
        """The same group with numpy arrays of the same memory, for a CPU's operations.

        Made once: asking twenty tensors for theirs costs more than routing twenty rows.
        """
        group: Any = type(self)
        return group(*(tensor.numpy() for tensor in self.tensors))

    def to(self, device: torch.device | str) -> Self:
        """The same group on a device."""
        return type(self)(*(tensor.to(device) for tensor in self.tensors))


@dataclass(frozen=True, eq=False)
class RouteRows(TensorGroup):
    """What each row asks.

    Attributes:
        policy_index: int32, (rows,): row of the policy table.
        token_index: int64, (rows,): token of the step, -1 for a row whose output is dropped.
        remix_index: int32, (rows,): row of the references, -1 for none. Or (0,).
        set_index: int32, (rows,): row of the shared sets, -1 for none. Or (0,).
    """

    policy_index: torch.Tensor
    token_index: torch.Tensor
    remix_index: torch.Tensor
    set_index: torch.Tensor


@dataclass(frozen=True, eq=False)
class Shared(TensorGroup):
    """What rows refer to beside the policy table.

    Attributes:
        references: fp32, (references, experts), >= 0, any mass: probabilities that rows are
            pulled towards (C3PO, arXiv 2504.07964).
        alpha: fp32, (references,): share of the row's own scores, in [0, 1].
        top: int32, (references,): how many of the row's best experts take part.
        members: bool, (sets, experts): experts of a set that rows share (batch budgets).
    """

    references: torch.Tensor
    alpha: torch.Tensor
    top: torch.Tensor
    members: torch.Tensor

    @classmethod
    def nothing(cls, experts: int, device: torch.device) -> Self:
        """No references and no sets."""
        references = torch.empty((0, experts), device=device)
        return cls(
            references=references,
            alpha=references.new_empty(0),
            top=references.new_empty(0, dtype=torch.int32),
            members=references.new_empty((0, experts), dtype=torch.bool),
        )


@dataclass(frozen=True, eq=False)
class PolicyTable(TensorGroup):
    """Controls of distinct policies in one layer; row 0 is the router's own choice.

    Attributes:
        limits: int32, (policies, 3): experts per token; the rank of the one expert of a weak pass
            (SCMoE, arXiv 2405.14507), or -1; whether `bias` or `marks` say anything.
        cuts: fp32, (policies, 2): least share of the first rank's score, 0 cuts nothing; share of
            the scores that the ranks before one may have, inf cuts nothing.
        bias: fp32, (policies, experts), added to selection scores; -inf masks.
        marks: uint8, (policies, experts): taken out of what was selected, always selected, put
            back if the router's own choice has it.
        forced_weight: fp32, (policies, experts): of what is always selected; NaN is the mean of
            the row's others.
    """

    limits: torch.Tensor
    cuts: torch.Tensor
    bias: torch.Tensor
    marks: torch.Tensor
    forced_weight: torch.Tensor


@dataclass(frozen=True, eq=False)
class Selection(TensorGroup):
    """What a router selects by itself.

    Attributes:
        weights: fp32, (rows, top_k). Or (0, 0).
        ids: int32, (rows, top_k). Or (0, 0).
    """

    weights: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> Self:
        """No row is left to the router."""
        weights = torch.empty((0, 0), device=device)
        return cls(weights, weights.int())


@dataclass(frozen=True, eq=False)
class SelectionCounts(TensorGroup):
    """Where routing is counted; written to.

    Attributes:
        histogram: int64, (layers, experts + 2): rows of each expert, then `ROWS` and `MASKED`.
        by_token: int64, (tokens, 3): experts run, selections of the router's own that were not,
            layers routed. Or (0, 3): not counted by token.
    """

    histogram: torch.Tensor
    by_token: torch.Tensor


@dataclass(frozen=True)
class RouterSpec(RouterConfig):
    """The router of one layer.

    Attributes:
        correction: fp32, (experts,), added to selection scores only. Or (0,).
    """

    correction: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @cached_property
    def correction_array(self) -> Any:
        """`correction` as a numpy array of the same memory, for a CPU's operations."""
        return self.correction.numpy()

    def to(self, device: torch.device | str) -> Self:
        """The same router with its correction on a device."""
        return replace(self, correction=self.correction.to(device))
