"""The layer loop: runs a step plan over a decoder's own modules.

One loop for every family. The residual stream is vLLM's pair `(delta, residual)`, whose sum is the
hidden state; a row that skips a sub-layer keeps its pending `delta` (design section 5). Rows that
run are compacted, and stay compacted as long as the following sub-layers want the same rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sluice.kernels.row_compact import row_compact, row_scatter
from sluice.models.depth.kv_fill import fill_keys_values
from sluice.models.plan import Rows, StepPlan
from sluice.models.seams.attention import RowsContext, build_rows_context, rows_forward_context
from sluice.models.stack import DecoderLayer, DecoderStack, Norm


class _ResidualStream:
    """`(delta, residual)` of all rows, (tokens, hidden) each, with one compacted view of some."""

    def __init__(self, delta: torch.Tensor, residual: torch.Tensor) -> None:
        self._all = (delta, residual)
        self._view = self._all
        self._rows: Rows | None = None

    def select(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of `rows`; what was selected before is written back first."""
        wanted = None if rows.everything else rows
        if wanted is not self._rows:
            self.expand()
            if wanted is not None:
                index = wanted.index(self._all[0].device)
                self._view = (
                    row_compact(self._all[0], index),
                    row_compact(self._all[1], index),
                )
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
            for state, view in zip(self._all, self._view, strict=True):
                row_scatter(state, index, view)
            self._rows, self._view = None, self._all
        return self._all


class LayerLoop:
    """Runs steps with a depth control; one instance per model runner."""

    def __init__(self, stack: DecoderStack, runner: Any) -> None:
        self._stack = stack
        self._runner = runner

    def run(
        self,
        plan: StepPlan,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Final hidden states of the step, (tokens, hidden), after the last norm.

        Args:
            plan: the step's plan.
            positions: (tokens,), int64.
            input_ids: (tokens,) or None if `inputs_embeds` is given.
            inputs_embeds: (tokens, hidden) or None.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            hidden = self._stack.embed(input_ids)
        else:
            # Fused norms work in place, and this is the runner's own buffer.
            hidden = inputs_embeds.clone()
        stream = _ResidualStream(hidden, torch.zeros_like(hidden))
        with rows_forward_context() as context:
            step = _Step(self._runner, context, positions)
            for layer, rows in zip(self._stack.layers, plan.layers, strict=True):
                if len(rows.fill):
                    step.fill(layer, rows.fill, *stream.select(rows.fill))
                if len(rows.attention):
                    stream.store(
                        *step.attend(layer, rows.attention, *stream.select(rows.attention))
                    )
                if len(rows.mlp):
                    stream.store(*_mlp(layer.mlp_norm, layer.mlp, *stream.select(rows.mlp)))
            final, _ = self._stack.final_norm(*stream.expand())
        return final


class _Step:
    """Per-step contexts of row sets, built on first use."""

    def __init__(self, runner: Any, context: Any, positions: torch.Tensor) -> None:
        self._runner = runner
        self._context = context
        self._positions = positions
        # Slots are padded for CUDA graphs; this loop runs the real tokens only.
        slots = {name: slot[: len(positions)] for name, slot in context.slot_mapping.items()}
        self._whole = RowsContext(dict(context.attn_metadata), slots)
        self._contexts: dict[int, tuple[RowsContext, torch.Tensor]] = {}

    def attend(
        self, layer: DecoderLayer, rows: Rows, delta: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self._enter(layer, rows)
        normed, residual = layer.attention_norm(delta, residual)
        return layer.attention(positions=positions, hidden_states=normed), residual

    def fill(
        self, layer: DecoderLayer, rows: Rows, delta: torch.Tensor, residual: torch.Tensor
    ) -> None:
        positions = self._enter(layer, rows)
        # The norm works in place and these rows keep their pair.
        normed, _ = layer.attention_norm(delta.clone(), residual.clone())
        fill_keys_values(layer, positions, normed)

    def _enter(self, layer: DecoderLayer, rows: Rows) -> torch.Tensor:
        """Point the forward context's entry of this layer at `rows`; their positions."""
        context, positions = self._of(rows)
        self._context.attn_metadata[layer.kv_name] = context.metadata[layer.kv_name]
        self._context.slot_mapping[layer.kv_name] = context.slots[layer.kv_name]
        return positions

    def _of(self, rows: Rows) -> tuple[RowsContext, torch.Tensor]:
        if rows.everything:
            return self._whole, self._positions
        if id(rows) not in self._contexts:
            self._contexts[id(rows)] = (
                build_rows_context(self._runner, rows),
                self._positions[rows.index(self._positions.device)],
            )
        return self._contexts[id(rows)]


def _mlp(
    norm: Norm, mlp: nn.Module, delta: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, residual = norm(delta, residual)
    return mlp(normed), residual
