"""The residual stream of a step as vLLM has it: a pair `(delta, residual)` whose sum is the state.

Rows that run a sub-layer are gathered (compacted), and stay gathered as long as the following
sub-layers run the same rows.
"""

from __future__ import annotations

import torch

from sluice.kernels.ops.row_compact import row_compact, row_scatter
from sluice.models.engine.plan import Rows
from sluice.models.policy.axes import IntArray


class ResidualStream:
    """vLLM's pair `(delta, residual)` of all rows, (tokens, hidden) each; the sum is the state."""

    def __init__(self, delta: torch.Tensor, residual: torch.Tensor) -> None:
        self._all = (delta, residual)
        self._view = self._all
        self._rows: Rows | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._all[0].device

    def select(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of `rows`; what was selected before is written back first."""
        wanted = None if rows.everything else rows
        if wanted is not self._rows:
            self.expand()
            if wanted is not None:
                index = wanted.index(self._all[0].device)
                self._view = row_compact(*self._all, index)
            self._rows = wanted
        return self._view

    def store(self, delta: torch.Tensor, residual: torch.Tensor) -> None:
        """Replace the selected rows' pair."""
        self._view = (delta, residual)
        if self._rows is None:
            self._all = self._view

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of all rows."""
        if self._rows is not None:
            index = self._rows.index(self._all[0].device)
            row_scatter(*self._all, index, *self._view)
            self._rows, self._view = None, self._all
        return self._all

    def hidden(self, tokens: IntArray) -> torch.Tensor:
        """Copy of the hidden states of rows, (rows, hidden), in the model's dtype."""
        delta, residual = self.expand()
        if len(tokens) == len(delta):
            return delta + residual
        index = torch.from_numpy(tokens).to(delta.device)
        delta, residual = row_compact(delta, residual, index)
        return delta + residual

    def assign(self, tokens: IntArray, hidden: torch.Tensor) -> None:
        """Set the hidden states of rows. `hidden`: (rows, hidden)."""
        delta, residual = self.expand()
        if len(tokens) == len(delta):
            delta.zero_()
            residual.copy_(hidden)
            return
        index = torch.from_numpy(tokens).to(delta.device)
        row_scatter(delta, residual, index, torch.zeros_like(hidden), hidden)
