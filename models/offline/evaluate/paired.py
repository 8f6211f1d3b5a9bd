"""Policies on the same items: how far apart they are, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sluice.models.offline.evaluate.results import PolicyResult
from sluice.models.offline.intervals import (
    Paired,
    corrected,
    mcnemar,
    paired_difference,
    ratio_of_sums,
)
from sluice.models.profile.values import Interval


@dataclass(frozen=True)
class Difference:
    """A policy against another one.

    Attributes:
        reference: the other's name.
        exact_match: this one's share of right answers less the other's, every task counting the
            same.
        gained: items that only this one has right.
        lost: items that only the other has right.
        p_value: of McNemar's exact test that as many are gained as lost, adjusted for the number
            of policies that are compared.
        faster: time of the other's requests over this one's, or None where nobody timed them.
    """

    reference: str
    exact_match: Interval
    gained: int
    lost: int
    p_value: float
    faster: Interval | None

    def to_wire(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "reference": self.reference,
            "exact_match": self.exact_match.model_dump(),
            "gained": self.gained,
            "lost": self.lost,
            "p_value": self.p_value,
            "faster": None if self.faster is None else self.faster.model_dump(),
        }


def differences(results: Sequence[PolicyResult]) -> list[Difference]:
    """Each result but the first against the first one, of the same items; of none there is none."""
    if not results:
        return []
    reference, *others = results
    tasks = [
        [
            Paired.of(each.right, reference.scores[task].right)
            for task, each in result.scores.items()
        ]
        for result in others
    ]
    changed = [(sum(t.gained for t in of), sum(t.lost for t in of)) for of in tasks]
    p_values = corrected([mcnemar(gained, lost) for gained, lost in changed])
    found = []
    for result, of, (gained, lost), p_value in zip(others, tasks, changed, p_values, strict=True):
        faster = None
        if result.times is not None and reference.times is not None:
            faster = ratio_of_sums(reference.times.requests, result.times.requests)
        difference = paired_difference(of)
        found.append(Difference(reference.policy, difference, gained, lost, float(p_value), faster))
    return found
