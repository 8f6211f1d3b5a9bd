"""Seam: logits that an exit test has computed are not computed again by the LM head.

The model runner calls the model's `compute_logits` right after the forward pass, with one hidden
state per request in batch order. An instance attribute replaces the method and puts known rows in
place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class KnownLogits:
    """Logits of a step's requests, offered before vLLM asks for all of them."""

    def __init__(self, model: nn.Module) -> None:
        """Stand before the model's LM head."""
        self._stock: Any = model.compute_logits
        self._requests: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        model.compute_logits = self._compute  # type: ignore[assignment]

    def offer(self, requests: torch.Tensor, logits: torch.Tensor) -> None:
        """Hold logits for the next call.

        Args:
            requests: batch indices, int64, (rows,), on the device of `logits`.
            logits: (rows, vocabulary), as the LM head gave them.
        """
        self._requests, self._logits = requests, logits

    def _compute(self, hidden: torch.Tensor) -> torch.Tensor | None:
        requests, known = self._requests, self._logits
        self._requests = self._logits = None
        if requests is None or known is None:
            computed: torch.Tensor | None = self._stock(hidden)
            return computed
        unknown = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        unknown[requests] = False
        logits = known.new_empty((len(hidden), known.shape[1]))
        logits[requests] = known
        if len(requests) < len(hidden):
            logits[unknown] = self._stock(hidden[unknown])
        return logits
