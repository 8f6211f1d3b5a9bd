"""The LM head on many rows, a part at a time: a vocabulary may be large."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sluice.models.calibrate.subject import Subject

LOGITS_AT_ONCE = 1 << 24
"""Logits that are held at a time."""


def row_parts(subject: Subject, rows: int) -> Iterator[slice]:
    """Rows in parts whose logits may be held at a time."""
    size = max(1, LOGITS_AT_ONCE // int(subject.config.vocab_size))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def head_rows(subject: Subject, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a residual stream, (rows, hidden): rows and theirs, (part, vocabulary)."""
    for part in row_parts(subject, len(states)):
        yield part, subject.logits(states[part])


def likeliest(subject: Subject, states: Tensor) -> Tensor:
    """The likeliest token of each row: (rows, hidden) to int64, (rows,)."""
    tokens = torch.empty(len(states), dtype=torch.long, device=states.device)
    for part, logits in head_rows(subject, states):
        tokens[part] = logits.argmax(-1)
    return tokens


def token_losses(subject: Subject, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What exits make of rows whose right tokens are known.

    Args:
        subject: the model.
        states: residual stream, (rows, hidden).
        tokens: int64, (rows,).

    Returns:
        Cross-entropy of the tokens, fp32, (rows,), and whether they are the likeliest, bool.
    """
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    right = torch.empty(len(states), dtype=torch.bool, device=states.device)
    for part, logits in head_rows(subject, states):
        losses[part] = nn.functional.cross_entropy(logits.float(), tokens[part], reduction="none")
        right[part] = logits.argmax(-1) == tokens[part]
    return losses, right
