"""Exit tests only while they pay, for a request that asks for it (`exit.sparing`).

A test on logits runs the LM head. Whether tests pay is told from the request's own tokens alone,
so that its answer does not depend on its neighbours or on how fast a machine is: over the last
`WINDOW` tested tokens, the layers that were left out must be worth the LM heads that were run.
Where they are not, every `PAUSE`-th token is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from sluice.models.policy.axes import FloatArray

WINDOW = 4
PAUSE = 16


class ExitHistory:
    """What came of the exit tests of one request."""

    def __init__(self, layers: Sequence[int], worth: FloatArray) -> None:
        """Start with the first generated token.

        Args:
            layers: after which a token is tested, ascending.
            worth: of leaving after each layer of the model: what it saves, in LM heads, (layers,).
        """
        self._layers = layers
        self._worth = worth
        self._gains: list[float | None] = []

    @property
    def tests_next(self) -> bool:
        """Whether the next token is to be tested."""
        # From the end: an answer may be long, and this is asked at each of its tokens.
        latest = (gain for gain in reversed(self._gains) if gain is not None)
        tested = [*islice(latest, WINDOW)]
        if len(tested) < WINDOW or sum(tested) >= 0:
            return True
        return all(gain is None for gain in self._gains[-PAUSE + 1 :])

    def note(self, left_after: int | None) -> None:
        """A token was decided.

        Args:
            left_after: the last layer that it ran, which is the model's last if it did not leave.
                None if it was not tested.
        """
        gain = None
        if left_after is not None:
            tests = sum(layer <= left_after for layer in self._layers)
            gain = float(self._worth[left_after]) - tests
        self._gains.append(gain)

    def undo(self, tokens: int) -> None:
        """Forget the last tokens."""
        del self._gains[len(self._gains) - tokens :]
