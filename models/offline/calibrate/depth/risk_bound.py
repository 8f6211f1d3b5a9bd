"""A bound on a risk that holds with a chosen probability: Learn-then-Test.

Sources: "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control" (arXiv
2110.01052), as CALM (arXiv 2207.07061) uses it: p-values by Hoeffding and Bentkus, and settings
tested in a fixed sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

_ROUNDING = 1e-9
"""A sum of losses that is a whole number may be seen this much above it."""


@dataclass(frozen=True)
class RiskBound:
    """What is to be shown of an expected loss.

    Attributes:
        tolerance: delta: the loss may be this much, in (0, 1).
        error: epsilon: probability that it is more although it was shown not to be, in (0, 1).
    """

    tolerance: float
    error: float

    @property
    def least(self) -> int:
        """Units without any loss that it takes to show the bound."""
        return math.ceil(math.log(self.error) / math.log1p(-self.tolerance))

    def shown(self, losses: Tensor) -> bool:
        """Whether the expected loss is at most the tolerance, but for the error.

        Args:
            losses: (units,), in [0, 1], of units drawn alike and one by one.
        """
        if not len(losses):
            return False
        mean = float(losses.double().mean())
        return hoeffding_bentkus(mean, self.tolerance, len(losses)) <= self.error

    def last_shown(self, tests: Iterable[tuple[T, Tensor]]) -> tuple[T, Tensor] | None:
        """Test one setting after the other until one fails.

        The order must not depend on these losses. Then the probability that any of the settings
        that pass has a greater expected loss than tolerated is at most the error.

        Args:
            tests: settings with their losses, see `shown`; not read beyond the first that fails.

        Returns:
            The last that passed, or None if the first one failed.
        """
        passed = None
        for setting, losses in tests:
            if not self.shown(losses):
                break
            passed = setting, losses
        return passed


def hoeffding_bentkus(mean: float, tolerance: float, count: int) -> float:
    """p-value of "the expected loss is more than the tolerance".

    `min(exp(-n h(min(r, d), d)), e P(Bin(n, d) <= ceil(n r)))` with the mean loss r, the tolerance
    d and `h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))`.

    Args:
        mean: of the losses, in [0, 1].
        tolerance: in (0, 1).
        count: of the losses, at least 1.
    """
    from scipy.stats import binom

    low = min(mean, tolerance)
    hoeffding = math.exp(-count * _divergence(low, tolerance))
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - _ROUNDING), count, tolerance))
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1.0 - a) * math.log((1.0 - a) / (1.0 - b)) if a < 1 else 0.0
    return first + second
