"""Masks over sub-layers: what one token does not run, and where it fills K/V all the same.

Source of static sets: LLM-Drop, "What Matters in Transformers?" (arXiv 2406.15786), whose
attention, MLP and block drop leave out a sub-layer together with its norm. K/V consequence: a
layer that no later token of the request will attend in needs nothing. A layer that later tokens do
attend in gets K/V filled from the hidden state that passed it by (`sluice.models.depth.kv_fill`):
prompt tokens that skip what generated ones run, and generated tokens that leave early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sluice.models.policy import Phase, SkipSet

PREFILL, DECODE = 0, 1
ATTENTION, MLP = 0, 1
MODULES = ("attention", "mlp")
PHASES = ("prefill", "decode")

BoolArray = NDArray[np.bool_]


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
