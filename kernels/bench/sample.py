"""Numbers measured several times."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One number a repeat.

    Attributes:
        values: in the order of the repeats; at least two.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their middle."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        tenths = statistics.quantiles(self.values, n=10, method="inclusive")
        return tenths[0], tenths[-1]

    def over(self, other: Sample) -> Sample:
        """The ratio of each repeat, of which both have as many."""
        pairs = zip(self.values, other.values, strict=True)
        return Sample(tuple(one / two for one, two in pairs))
