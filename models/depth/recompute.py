"""Exact K/V for tokens that left early: run them on when a later token goes deeper.

Source: EE-LLM's K/V recomputation (arXiv 2312.04916), bounded. A generated token that leaves after
layer e waits with its hidden state; when a later token of the request runs layer e + 1 and beyond,
the waiting ones run along as extra rows, so that attention always sees full depth's K/V. Waiting
tokens therefore never have to be there at preemption: recomputing the request writes them all.

A token runs full depth whatever its exit says if `LIMIT` tokens have left since the last one that
did, or if it is the last of a K/V block: vLLM publishes a full block to the prefix cache, and it
must be whole by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 8


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A generated token that has not run its upper layers.

    Attributes:
        position: in the request's sequence.
        depth: last layer it ran, 0-based.
        hidden: residual stream after that layer, (hidden,).
    """

    position: int
    depth: int
    hidden: Tensor


@dataclass(slots=True)
class PendingTokens:
    """Tokens of one request that wait.

    Attributes:
        tokens: by ascending position; their depths never increase.
        left: tokens that left early since the last one that ran full depth. A preemption empties
            the list and not this count: it must not change which token runs full depth next.
        left_before: the count before each token that was decided.
    """

    tokens: list[PendingToken] = field(default_factory=list)
    left: int = 0
    left_before: list[int] = field(default_factory=list)

    def must_run_full_depth(self, position: int, block_size: int) -> bool:
        """Whether the token at `position` may not leave early."""
        return self.left >= LIMIT or (position + 1) % block_size == 0

    def forget_from(self, position: int) -> None:
        """Drop tokens that vLLM computes again after a preemption."""
        self.tokens = [token for token in self.tokens if token.position < position]

    def undo(self, count: int) -> None:
        """Forget what was decided for the last tokens: they are decided again."""
        self.left = self.left_before[-count]
        del self.left_before[-count:]

    def clear(self) -> None:
        """Let no token wait: one ran full depth, and with it all that waited."""
        self.left_before.append(self.left)
        self.tokens = []
        self.left = 0

    def leave(self, position: int, depth: int, states: Tensor) -> None:
        """Add a token that left early; those that waited have run along.

        Args:
            position: of the token.
            depth: last layer it ran, 0-based.
            states: residual streams of the waiting tokens and of this one, (tokens + 1, hidden).
        """
        self.left_before.append(self.left)
        self.left += 1
        reached = [(token.position, max(token.depth, depth)) for token in self.tokens]
        reached.append((position, depth))
        self.tokens = [
            PendingToken(at, layer, state)
            for (at, layer), state in zip(reached, states, strict=True)
        ]
