"""Decode steps, one row per request, on static buffers: masks are data, and launches never change.

Every row stays in every layer that somebody wants. Whose output is kept, and who writes K/V, are
masks in a buffer; a layer that nobody wants is not launched. So a launch depends on the layer and
the padded number of rows alone, and is recorded once: a layer's parts by themselves, and runs of 2,
4, 8, ... whole layers, for which one launch does.

Rows that skip ride along for free: a decode step takes as long as reading the weights does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sluice.models.engine.captured.recorders import (
    Launch,
    LaunchRecorder,
    Limits,
    Spending,
)
from sluice.models.policy.axes import BoolArray

Pair = tuple[torch.Tensor, torch.Tensor]


class DecodeRows(NamedTuple):
    """The rows of a layer's attention.

    Attributes:
        delta: (rows, hidden).
        residual: (rows, hidden); the sum of both is the hidden state.
        positions: (rows,), int64.
        writes: who writes K/V, bool, (rows,); the others write nothing.
    """

    delta: torch.Tensor
    residual: torch.Tensor
    positions: torch.Tensor
    writes: torch.Tensor


class DecodeLayer(Protocol):
    """A layer whose launches are recorded.

    Nothing may be read back to the host, and what is read must lie at constant addresses.
    """

    def attend(self, rows: DecodeRows) -> Pair:
        """Norm and attention; the pair with the attention's output as `delta`."""

    def run_mlp(self, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
        """Norm and MLP; the pair with the MLP's output as `delta`."""

    def fill(self, rows: DecodeRows) -> None:
        """Write K/V; the pair stays."""


class Parts(Enum):
    """What of a layer one launch runs."""

    FILL = "fill"
    ATTENTION = "attention"
    MLP = "mlp"
    BLOCK = "block"


class LayerMasks(NamedTuple):
    """Whose output of a layer's parts is kept, and who writes K/V; bool, (rows,) each."""

    attention: BoolArray
    mlp: BoolArray
    writes: BoolArray

    @property
    def parts(self) -> tuple[Parts, ...]:
        """What has to run."""
        attends, runs_mlp = self.attention.any(), self.mlp.any()
        if attends and runs_mlp:
            return (Parts.BLOCK,)
        before = Parts.ATTENTION if attends else Parts.FILL if self.writes.any() else None
        return tuple(part for part in (before, Parts.MLP if runs_mlp else None) if part)


class _Key(NamedTuple):
    """A launch: `parts` of `length` layers from `first` on, for `rows` rows."""

    rows: int
    parts: Parts
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """What launches read and write, at addresses that never change.

    Attributes:
        delta: (rows, hidden).
        residual: (rows, hidden).
        positions: (rows,), int64.
        masks: `LayerMasks` of each layer, bool, (layers, 3, rows).
    """

    delta: torch.Tensor
    residual: torch.Tensor
    positions: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def allocate(
        cls, layers: int, rows: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> DecodeBuffers:
        """Buffers for up to `rows` rows."""
        delta = torch.zeros((rows, hidden), dtype=dtype, device=device)
        return cls(
            delta=delta,
            residual=torch.zeros_like(delta),
            positions=torch.zeros(rows, dtype=torch.int64, device=device),
            masks=torch.zeros((layers, 3, rows), dtype=torch.bool, device=device),
        )


class CapturedDecode:
    """The launches of one model."""

    def __init__(
        self,
        layers: Sequence[DecodeLayer],
        buffers: DecodeBuffers,
        recorder: LaunchRecorder,
        limits: Limits,
    ) -> None:
        self._layers = layers
        self._recorder = recorder
        self._limits = limits
        self._spending = Spending(buffers.delta.device)
        self._launches: dict[_Key, Launch] = {}
        self._sizes: set[int] = set()
        self._loaded = np.zeros(tuple(buffers.masks.shape), dtype=np.bool_)
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self._launches)

    def __contains__(self, rows: int) -> bool:
        """Whether steps of so many rows, padding included, can run."""
        return rows in self._sizes

    @property
    def spending(self) -> Spending:
        """What the launches have cost."""
        return self._spending

    def capture(self, rows: int) -> bool:
        """Record the launches for a padded number of rows, as the step's surroundings are now.

        Returns:
            Whether they are all there; if not, a limit was reached.
        """
        keys = self._keys(rows)
        for key in keys:
            if self._spending.exceeds(self._limits):
                for each in keys:
                    self._launches.pop(each, None)
                return False
            self._launches[key] = self._recorder.record(self._function(key))
        self._sizes.add(rows)
        return True

    def begin(self, hidden: torch.Tensor, positions: torch.Tensor, rows: int) -> DecodeRun:
        """Begin a step.

        Args:
            hidden: embedded tokens, (tokens, hidden).
            positions: (tokens,), int64.
            rows: to run with, in `self`; at least as many as tokens.
        """
        tokens, buffers = len(hidden), self.buffers
        buffers.delta[:tokens].copy_(hidden)
        # What padding rows hold must not become infinite over the steps.
        buffers.delta[tokens:rows].zero_()
        buffers.residual[:rows].zero_()
        buffers.positions[:tokens].copy_(positions)
        return DecodeRun(self, tokens, rows)

    def load(self, first: int, masks: BoolArray) -> None:
        """Put masks in place, (layers, 3, rows), of layers from `first` on."""
        place = np.s_[first : first + len(masks), :, : masks.shape[2]]
        if np.array_equal(self._loaded[place], masks):
            return
        self._loaded[place] = masks
        source = torch.from_numpy(masks)
        if self.buffers.masks.is_cuda:
            source = source.pin_memory()
        self.buffers.masks[place].copy_(source, non_blocking=True)

    def launch(self, parts: Parts, first: int, layers: int, rows: int) -> None:
        """Run one kind of parts of some adjacent layers, in as few launches as there are for it."""
        end = first + layers
        while first < end:
            length = 1
            while first + 2 * length <= end and (
                _Key(rows, parts, first, 2 * length) in self._launches
            ):
                length *= 2
            self._launches[_Key(rows, parts, first, length)]()
            first += length

    def _keys(self, rows: int) -> list[_Key]:
        count = len(self._layers)
        keys = [_Key(rows, parts, layer, 1) for layer in range(count) for parts in Parts]
        length = 2
        while length <= count:
            starts = range(0, count - length + 1, length)
            keys += [_Key(rows, Parts.BLOCK, first, length) for first in starts]
            length *= 2
        return keys

    def _function(self, key: _Key) -> Launch:
        def run() -> None:
            for index in range(key.first, key.first + key.length):
                self._run(index, key.parts, key.rows)

        return run

    def _run(self, index: int, parts: Parts, rows: int) -> None:
        layer, buffers = self._layers[index], self.buffers
        delta, residual = pair = buffers.delta[:rows], buffers.residual[:rows]
        attends, runs_mlp, writes = buffers.masks[index, :, :rows]
        attending = DecodeRows(*pair, buffers.positions[:rows], writes)
        if parts is Parts.FILL:
            layer.fill(attending)
            return
        if parts is not Parts.MLP:
            pair = _kept(layer.attend(attending), attends)
        if parts is not Parts.ATTENTION:
            pair = _kept(layer.run_mlp(*pair), runs_mlp)
        delta.copy_(pair[0])
        if pair[1] is not residual:  # Fused norms work in place.
            residual.copy_(pair[1])


class DecodeRun:
    """One step: its layers in order, launched late, so that adjacent ones go together."""

    def __init__(self, captured: CapturedDecode, tokens: int, rows: int) -> None:
        self._captured = captured
        self._tokens = tokens
        self._rows = rows
        self._waiting: list[tuple[Parts, int]] = []

    @property
    def pair(self) -> Pair:
        """Views of the step's rows, (tokens, hidden) each; current after `settle`."""
        buffers = self._captured.buffers
        return buffers.delta[: self._tokens], buffers.residual[: self._tokens]

    def load(self, first: int, masks: Sequence[LayerMasks]) -> None:
        """Put masks of layers from `first` on in place; layers before must have been run."""
        table = np.zeros((len(masks), 3, self._rows), dtype=np.bool_)
        for row, of_layer in zip(table, masks, strict=True):
            row[:, : self._tokens] = of_layer
        self._captured.load(first, table)

    def all_layers(self, masks: Sequence[LayerMasks]) -> Pair:
        """Run every layer by its masks; the pair after them."""
        self.load(0, masks)
        for index, mask in enumerate(masks):
            self.layer(index, mask.parts)
        self.settle()
        return self.pair

    def layer(self, index: int, parts: Sequence[Parts]) -> None:
        """Run parts of a layer."""
        self._waiting += [(part, index) for part in parts]

    def settle(self) -> None:
        """Launch what waits."""
        for parts, first, layers in _runs(self._waiting):
            self._captured.launch(parts, first, layers, self._rows)
        self._waiting.clear()


def _runs(waiting: Sequence[tuple[Parts, int]]) -> Iterator[tuple[Parts, int, int]]:
    """Adjacent layers with the same parts: the parts, the first layer, the number of layers."""
    begin = 0
    for end in range(1, len(waiting) + 1):
        parts, index = waiting[end - 1]
        if end == len(waiting) or waiting[end] != (parts, index + 1):
            yield parts, waiting[begin][1], end - begin
            begin = end


def _kept(pair: Pair, keep: torch.Tensor) -> Pair:
    # Not a product: what an attention made of K/V that nobody wrote may be NaN.
    return torch.where(keep[:, None], pair[0], 0), pair[1]
