"""Static skip sets: sub-layers a request names and does not run.

Source: LLM-Drop, "What Matters in Transformers?" (arXiv 2406.15786), whose attention, MLP and
block drop leave out a sub-layer together with its norm. K/V consequence: a layer skipped in both
phases, or by decode tokens only, is never attended by the tokens that skipped it, so nothing is
written for them. A layer skipped by prompt tokens only is attended by the generated ones, so its
K/V are filled from the hidden state that passed the layer by (`sluice.models.depth.kv_fill`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sluice.models.policy import Phase, SkipSet

PREFILL, DECODE = 0, 1
ATTENTION, MLP = 0, 1
MODULES = ("attention", "mlp")


def skip_masks(skip: SkipSet, num_layers: int) -> NDArray[np.bool_]:
    """Masks of a skip set.

    Returns:
        bool, shape (2 phases, num_layers, 2 modules); True where a token of the phase skips the
        module.

    Raises:
        IndexError: a layer is outside [0, num_layers); the HTTP edge has refused those before.
    """
    masks = np.zeros((2, num_layers, len(MODULES)), dtype=np.bool_)
    for phase, applies in (
        (PREFILL, skip.phase in (Phase.PREFILL, Phase.BOTH)),
        (DECODE, skip.phase in (Phase.DECODE, Phase.BOTH)),
    ):
        if applies:
            masks[phase, list(skip.attention), ATTENTION] = True
            masks[phase, list(skip.mlp), MLP] = True
    return masks


def fill_masks(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Layers whose K/V a skipping prompt token must still write.

    Args:
        masks: bool, shape (..., 2 phases, layers, 2 modules).

    Returns:
        bool, shape (..., layers); True where prompt tokens skip attention and decode tokens do not.
    """
    skipped = masks[..., ATTENTION]
    filled: NDArray[np.bool_] = skipped[..., PREFILL, :] & ~skipped[..., DECODE, :]
    return filled
