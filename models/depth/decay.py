"""CALM's decaying threshold: strict for the first generated tokens, looser towards the end.

Source: CALM (arXiv 2207.07061): an early mistake spoils everything after it.
"""

from __future__ import annotations

import math


def decayed(threshold: float, temperature: float | None, index: int, max_tokens: int) -> float:
    """`clip(0.9 threshold + 0.1 exp(-temperature index / max_tokens), 0, 1)`.

    Args:
        threshold: of the rule.
        temperature: CALM's tau, or None for a constant threshold.
        index: of the generated token, from 0.
        max_tokens: longest output the client allowed.
    """
    if temperature is None:
        return threshold
    loosened = 0.9 * threshold + 0.1 * math.exp(-temperature * index / max_tokens)
    return min(max(loosened, 0.0), 1.0)
