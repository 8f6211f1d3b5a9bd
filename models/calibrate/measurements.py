"""What a yardstick finds of policies: each is measured once, and kept."""

from __future__ import annotations

from typing import Any

from sluice.models.calibrate.engine import Work
from sluice.models.calibrate.workspace import Workspace
from sluice.models.calibrate.yardstick import Quality, Yardstick
from sluice.models.policy import RoutingPolicy

_QUALITY = "frontier-quality"
_RATIOS = "frontier-ratios"


class Measurements:
    """Quality and pace by policy, as `Yardstick` finds them."""

    def __init__(self, yardstick: Yardstick, workspace: Workspace, key: str) -> None:
        """Take up what was measured before.

        Args:
            yardstick: finds what is missing.
            workspace: where it is kept.
            key: of all that a measurement depends on, but for the policy.
        """
        self._yardstick, self._workspace, self._key = yardstick, workspace, key
        self._qualities: dict[str, Any] = workspace.value(_QUALITY, key) or {}
        self._ratios: dict[str, Any] = workspace.value(_RATIOS, key) or {}

    def quality(self, policy: RoutingPolicy) -> Quality:
        """Quality of a policy, and its work."""
        if policy.digest not in self._qualities:
            found = self._yardstick.quality(policy)
            work = found.work
            fractions = [work.compute_fraction, work.generated_fraction]
            self._qualities[policy.digest] = [
                found.value,
                work.generated,
                work.mean_layers,
                *fractions,
            ]
            self._workspace.keep(_QUALITY, self._key, self._qualities)
        value, *work_fields = self._qualities[policy.digest]
        return Quality(value, Work(*work_fields))

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        """Full depth's time over the policy's, pair by pair."""
        if policy.digest not in self._ratios:
            self._ratios[policy.digest] = self._yardstick.ratios(policy, repeats)
            self._workspace.keep(_RATIOS, self._key, self._ratios)
        found: list[float] = self._ratios[policy.digest]
        return found
