"""Masks over sub-layers: what one token does not run, and where it fills K/V all the same.

A batch has many tokens and few distinct masks: `MaskTable` keeps each mask once, and a `Segment`
is a run of tokens that share a row of it.

Source of static sets: LLM-Drop, "What Matters in Transformers?" (arXiv 2406.15786), whose
attention, MLP and block drop leave out a sub-layer together with its norm. K/V consequence: a
layer that no later token of the request will attend in needs nothing. A layer that later tokens do
attend in gets K/V filled from the hidden state that passed it by
(`sluice.models.vllm_adapter.kv_fill`): prompt tokens that skip what generated ones run, and
generated tokens that leave early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from sluice.models.policy.axes import ATTENTION, MLP, MODULES, BoolArray
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.policy.row_table import FIRST_ROW, RowTable


@dataclass(frozen=True, slots=True, eq=False)
class DepthMask:
    """One token's way through the layers.

    Attributes:
        skip: bool, (layers, 2 modules); True where the module does not run.
        fill: bool, (layers,); True where K/V are written though attention does not run.
    """

    skip: BoolArray
    fill: BoolArray

    @classmethod
    def full(cls, num_layers: int) -> Self:
        """Full depth."""
        return cls(
            np.zeros((num_layers, len(MODULES)), dtype=np.bool_),
            np.zeros(num_layers, dtype=np.bool_),
        )

    @property
    def key(self) -> bytes:
        """Equal masks have equal keys."""
        return self.skip.tobytes() + self.fill.tobytes()

    def without_blocks(self, blocks: BoolArray, *, fill: bool) -> DepthMask:
        """This mask with more blocks left out.

        Args:
            blocks: bool, (layers,).
            fill: whether K/V are written in the newly skipped attentions.
        """
        newly = blocks & ~self.skip[:, ATTENTION] if fill else np.zeros_like(blocks)
        return DepthMask(self.skip | blocks[:, np.newaxis], self.fill | newly)

    def leaving_after(self, layer: int, *, fill: bool) -> DepthMask:
        """This mask for a token that leaves the loop after `layer` (0-based)."""
        return self.without_blocks(np.arange(len(self.fill)) > layer, fill=fill)


def phase_masks(skip: SkipSet, num_layers: int) -> tuple[DepthMask, DepthMask]:
    """Masks of prompt tokens and of generated tokens under a static set.

    Raises:
        IndexError: a layer is outside [0, num_layers); the HTTP edge has refused those before.
    """
    full = DepthMask.full(num_layers)
    chosen = full.skip.copy()
    chosen[list(skip.attention), ATTENTION] = True
    chosen[list(skip.mlp), MLP] = True
    prefill = chosen if skip.phase is not Phase.DECODE else full.skip
    decode = chosen if skip.phase is not Phase.PREFILL else full.skip
    # Elastic tokens may run what the set leaves out, and then attend there.
    attended = ~decode[:, ATTENTION] | skip.elastic
    return DepthMask(prefill, prefill[:, ATTENTION] & attended), DepthMask(decode, full.fill)


FULL_DEPTH = FIRST_ROW
"""Row of the mask that leaves nothing out."""


class MaskTable:
    """The distinct masks of a batch's tokens, one row each.

    Attributes:
        skip: bool, (rows, layers, 2 modules); True where a token does not run the module.
        fill: bool, (rows, layers); True where it writes the layer's K/V without attending.
        versions: how many masks each row has had.
    """

    def __init__(self, num_layers: int) -> None:
        full = DepthMask.full(num_layers)
        self._rows = RowTable(full.key)
        self.skip: BoolArray = full.skip[np.newaxis].copy()
        self.fill: BoolArray = full.fill[np.newaxis].copy()
        self.versions = [1]

    def acquire(self, mask: DepthMask) -> int:
        """Row of `mask`, to be released once for every time it was acquired."""
        row, is_new = self._rows.acquire(mask.key)
        if is_new:
            if row == len(self.skip):
                self.skip = np.concatenate([self.skip, mask.skip[np.newaxis]])
                self.fill = np.concatenate([self.fill, mask.fill[np.newaxis]])
                self.versions.append(0)
            self.skip[row], self.fill[row] = mask.skip, mask.fill
            self.versions[row] += 1
        return row

    def release(self, row: int) -> bool:
        """Give a row back; True if that was its last user and another mask may get it."""
        return self._rows.release(row)

    def mask(self, row: int) -> DepthMask:
        """The mask of an acquired row."""
        return DepthMask(self.skip[row].copy(), self.fill[row].copy())


class Segment(NamedTuple):
    """A run of tokens of one request and phase that share a mask.

    Attributes:
        request: batch index.
        phase: `PREFILL` or `DECODE`.
        mask: row of the `MaskTable`.
        length: tokens.
        pending: the tokens are not scheduled in this step: they wait for layers that they have
            not run (`sluice.models.depth.recompute`).
        weak: the tokens are another request's, once more, for the weak pass of its contrast
            (`sluice.models.experts.contrast`); `request` is then past the batch's end.
    """

    request: int
    phase: int
    mask: int
    length: int
    pending: bool = False
    weak: bool = False
