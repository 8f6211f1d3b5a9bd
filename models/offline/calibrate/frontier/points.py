"""Points of a frontier: settings, measured one after the other in one engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sluice.models.offline.calibrate.frontier.measure import Measurements, Quality
from sluice.models.offline.calibrate.frontier.nearly_free import Family, nearly_free
from sluice.models.offline.calibrate.frontier.pareto import (
    ALLOWED_TOKENS,
    Allowance,
    measures_of,
    on_frontier,
)
from sluice.models.offline.calibrate.frontier.settings import Setting
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.step import Track
from sluice.models.offline.engine import OfflineEngine
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.intervals import corrected, mean_above, median_interval, share_interval
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.frontier_fields import FailedSetting, FrontierPoint
from sluice.models.profile.values import Interval
from sluice.models.routing.errors import RoutingError

DIGITS = 6
"""Of fractions of compute, as in reports."""


@dataclass
class Points:
    """Measures settings; those that come to one policy are one point, under the first one's name.

    Attributes:
        engine: that measures them.
        kept: what was measured.
        items: that quality is measured on.
        repeats: of timing.
        least: share of full depth's tokens that a setting must agree with, to be timed.
        track: makes progress visible.
        failed: settings that agree with fewer.
    """

    engine: OfflineEngine
    kept: Measurements
    items: Items
    repeats: int
    least: float
    track: Track
    failed: dict[str, FailedSetting] = field(default_factory=dict)
    _found: dict[str, FrontierPoint] = field(default_factory=dict)

    def measure(self, settings: Sequence[Setting]) -> None:
        """Add points, the first of all being full depth."""
        for setting in self.track(settings, "settings", len(settings)):
            policy = self.policy(setting)
            if policy.digest in self._found or policy.digest in self.failed:
                continue
            tokens = None if policy.stock else self.kept.tokens(policy)
            if tokens is not None and tokens.agreement.value < self.least:
                self.failed[policy.digest] = FailedSetting(
                    name=setting.name,
                    routing=dict(setting.routing),
                    reason=f"agrees with {tokens.agreement.value:.1%} of full depth's tokens",
                )
            else:
                self._found[policy.digest] = self._point(setting, policy)

    def refined(self, families: Iterable[Family]) -> list[Setting]:
        """What can be left out of each family at almost no loss, full depth being measured."""
        allowance, presets = self.allowance, [*ALLOWED_TOKENS]
        given = [*families]

        def keeps(preset: str, setting: Setting) -> bool:
            return allowance.keeps_tokens(preset, self.kept.tokens(self.policy(setting)))

        found: list[Setting] = []
        for family in self.track(given, "what is nearly free", len(given)):
            found += nearly_free(family, keeps, presets)
        return found

    @property
    def allowance(self) -> Allowance:
        """What presets may lose, full depth being measured."""
        return Allowance.of([*self._found.values()], self.kept.noise(), self.items.measure)

    def points(self) -> tuple[FrontierPoint, ...]:
        """All of them, full depth first, each marked if it is on the frontier."""
        points = self._tested([*self._found.values()])
        kept = on_frontier([measures_of(point) for point in points])
        return tuple(
            point.model_copy(update={"on_frontier": keep})
            for point, keep in zip(points, kept, strict=True)
        )

    def best(self, settings: Iterable[Setting], count: int) -> list[Setting]:
        """The fastest of those that the preset with the most loss would allow, so many of them."""
        allowance = self.allowance
        measured = [(self._found.get(self.policy(each).digest), each) for each in settings]
        # A setting that came to another's policy has no point of its own.
        allowed = [
            (point.speed.value, setting)
            for point, setting in measured
            if point is not None and point.name == setting.name and allowance.allows("fast", point)
        ]
        ordered = sorted(allowed, key=lambda entry: -entry[0])
        return [setting for _, setting in ordered[:count]]

    def policy(self, setting: Setting) -> RoutingPolicy:
        """The policy of a setting.

        Raises:
            CalibrationError: the engine refuses it.
        """
        try:
            return self.engine.resolve(setting.routing)
        except RoutingError as error:
            message = f"setting {setting.name!r}: {error.param}: {error.message}"
            raise CalibrationError(message) from None

    def interval(self, quality: Quality) -> Interval:
        """Of tasks Wilson's, of the agreement of tokens its own."""
        if self.items.tasks or quality.tokens is None:
            return share_interval(quality.value, self.items.count)
        return quality.tokens.agreement

    def _tested(self, points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
        """Points with the p-values of their being faster than full depth, which is the first.

        A repeat's ratio is of two times that were taken in turn, so Student's t-test is of the
        ratios' logarithms.
        """
        policies = [self.engine.resolve(point.routing) for point in points[1:]]
        raw = [mean_above(np.log(self.kept.ratios(p, self.repeats))) for p in policies]
        pairs = zip(points[1:], corrected(raw).tolist(), strict=True)
        return [points[0], *(point.model_copy(update={"faster": p}) for point, p in pairs)]

    def _point(self, setting: Setting, policy: RoutingPolicy) -> FrontierPoint:
        quality = self.kept.quality(policy)
        normalised = quality.normalised
        return FrontierPoint(
            name=setting.name,
            routing=dict(setting.routing),
            quality=self.interval(quality),
            speed=median_interval(self.kept.ratios(policy, self.repeats)),
            compute_fraction=round(quality.work.compute_fraction, DIGITS),
            generated_fraction=round(quality.generated_fraction, DIGITS),
            on_frontier=False,
            tokens=quality.tokens,
            normalised=None if normalised is None else share_interval(normalised, self.items.count),
        )
