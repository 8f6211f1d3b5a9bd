"""What the rows of one step ask of the routers, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sluice.models.expert_policy import ExpertBudget
from sluice.models.experts.ledger import StepLedger
from sluice.models.experts.remix import Pathway
from sluice.models.experts.table import ExpertTable

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one call of a router that are not left to vLLM.

    Attributes:
        rows: places within the call, int64, (rows,).
        everything: all rows of the call are here.
        table_rows: their rows of the expert table, int64, (rows,).
        weak: rows of a weak pass may be among them.
        budgets: budgets with the places of their rows among `rows`, int64.
        remixes: pathways with the places of their rows among `rows`, int64.
    """

    rows: IntArray
    everything: bool
    table_rows: IntArray
    weak: bool
    budgets: tuple[tuple[ExpertBudget, torch.Tensor], ...]
    remixes: tuple[tuple[Pathway, torch.Tensor], ...]


class StepExperts:
    """Expert controls of a step's token rows.

    Attributes:
        table: of the live policies.
        ledger: what its routers did.
    """

    def __init__(
        self,
        table: ExpertTable,
        table_rows: IntArray,
        budgets: dict[ExpertBudget, IntArray],
        remixes: list[tuple[Pathway, IntArray]],
    ) -> None:
        """Describe a step.

        Args:
            table: of the live policies.
            table_rows: row of each token, int64, (tokens,).
            budgets: token rows that share a budget, int64.
            remixes: token rows that a pathway applies to, int64.
        """
        self.table = table
        self.ledger = StepLedger(len(table_rows))
        self._table_rows = table_rows
        self._budgets = budgets
        self._remixes = remixes
        self._calls: dict[bytes, CallRows] = {}

    @property
    def controlled(self) -> bool:
        """Whether any row is not left to vLLM."""
        return bool(self._table_rows.any() or self._budgets or self._remixes)

    def call(self, tokens: IntArray) -> CallRows:
        """The rows that a router is about to see. `tokens`: ascending, int64."""
        key = tokens.tobytes()
        if key not in self._calls:
            self._calls[key] = CallRows(
                tokens, self.table, self._table_rows[tokens], self._of(tokens)
            )
        return self._calls[key]

    def _of(self, tokens: IntArray) -> _Extras:
        """Budgets and pathways with places within `tokens` instead of token rows."""

        def places(own: IntArray) -> IntArray:
            return np.flatnonzero(np.isin(tokens, own))

        budgets = [(budget, places(own)) for budget, own in self._budgets.items()]
        remixes = [(pathway, places(own)) for pathway, own in self._remixes]
        return _Extras(
            [(budget, own) for budget, own in budgets if len(own)],
            [(pathway, own) for pathway, own in remixes if len(own)],
        )


@dataclass(frozen=True, slots=True)
class _Extras:
    """Budgets and pathways with their rows, int64."""

    budgets: list[tuple[ExpertBudget, IntArray]]
    remixes: list[tuple[Pathway, IntArray]]


class CallRows:
    """One set of rows on its way through routers.

    Attributes:
        tokens: rows of the step, int64, (rows,).
    """

    def __init__(
        self, tokens: IntArray, table: ExpertTable, table_rows: IntArray, extras: _Extras
    ) -> None:
        self.tokens = tokens
        self._table_rows = table_rows
        self._extras = extras
        self._weak = bool((table.weak_ranks(table_rows) >= 0).any())
        self._active = np.ascontiguousarray(table.active[table_rows].T)
        self._cache: dict[tuple[bytes, tuple[int, ...]], LayerRows | None] = {}

    def controlled(self, place: int, layer: int) -> LayerRows | None:
        """Rows that are not left to vLLM, or None if all are.

        Args:
            place: of the layer among those with experts.
            layer: its number in the decoder.
        """
        chosen = self._active[place]
        remixes = tuple(
            number
            for number, (pathway, _) in enumerate(self._extras.remixes)
            if layer in pathway.remix.layers
        )
        key = (chosen.tobytes(), remixes)
        if key not in self._cache:
            self._cache[key] = self._rows(chosen, [self._extras.remixes[n] for n in remixes])
        return self._cache[key]

    def _rows(
        self, chosen: NDArray[np.bool_], remixes: list[tuple[Pathway, IntArray]]
    ) -> LayerRows | None:
        extras = [*self._extras.budgets, *remixes]
        if extras:
            chosen = chosen.copy()
            for _, own in extras:
                chosen[own] = True
        if not chosen.any():
            return None
        rows = np.flatnonzero(chosen)
        place = np.cumsum(chosen) - 1
        return LayerRows(
            rows=rows,
            everything=len(rows) == len(chosen),
            table_rows=self._table_rows[rows],
            weak=self._weak,
            budgets=tuple((b, torch.from_numpy(place[own])) for b, own in self._extras.budgets),
            remixes=tuple((p, torch.from_numpy(place[own])) for p, own in remixes),
        )
