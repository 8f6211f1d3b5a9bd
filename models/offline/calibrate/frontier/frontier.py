"""Step: settings of depth and experts measured together, and what presets and `effort` are."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from sluice.models.offline.calibrate.frontier.greedy_levels import (
    GreedyLevel,
    LayerUnit,
    drawn,
    greedy_levels,
    uniform,
    units,
    without,
)
from sluice.models.offline.calibrate.frontier.measure import (
    AT_ONCE,
    Measurements,
    Quality,
    SettingMeasure,
)
from sluice.models.offline.calibrate.frontier.pareto import (
    Allowance,
    choose,
    measures_of,
    on_frontier,
    shortfalls,
)
from sluice.models.offline.calibrate.frontier.settings import (
    FULL_DEPTH,
    Setting,
    depth_settings,
    expert_settings,
    skip_setting,
    together,
)
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.pipeline import engine_of, profile_parts
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part, key_of
from sluice.models.offline.engine import OfflineEngine
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.offline.intervals import (
    LEAST_REPEATS,
    corrected,
    mean_above,
    median_interval,
    share_interval,
)
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.fields import (
    EffortLevel,
    EqualCompute,
    FrontierFields,
    FrontierPoint,
    Interval,
)
from sluice.models.routing.errors import RoutingError

_LOG = logging.getLogger(__name__)
_Chosen = Literal["chain", "uniform", "random"]


@dataclass(frozen=True)
class Frontier(Step):
    """Measures what the other steps found, in one engine; see `SettingMeasure` for how.

    Candidates are the greedy levels
    (`sluice.models.offline.calibrate.frontier.greedy_levels`) and those of
    `sluice.models.offline.calibrate.frontier.settings`; then the best of depth with the best of
    experts. Settings that come to one policy are one point, under the first one's name. Intervals
    are at 95 %: Wilson's for quality, between order statistics for the median speed.

    A point has the speed that it was measured to have, full depth included, which was timed against
    itself: its interval shows the noise. Presets are chosen as `pareto.choose` says. The greedy
    levels are those of `effort`, each at the share of full depth's compute on generated tokens
    that its records count; they are nested by construction.
    """

    name: ClassVar[str] = "frontier"
    help: ClassVar[str] = "settings measured together: quality, speed, compute; presets and effort"
    needs: ClassVar[tuple[str, ...]] = (
        "importance",
        "heads",
        "routers",
        "exits",
        "super-experts",
        "expert-k",
        "skip-ratios",
        "search",
    )
    reads_tasks: ClassVar[bool] = True

    items: int = option(400, "tasks that quality is measured on, at most")
    prompts: int = option(64, "prompts on which full depth's own tokens are compared, at most")
    batch: int = option(8, "requests at a time while speed is measured")
    timed: int = option(32, "answers that speed is measured on")
    repeats: int = option(7, "times that a setting and full depth are timed in turn, at least 6")
    sub_layers: bool = option(False, "levels leave out attentions and MLPs one by one, not blocks")
    levels: int = option(8, "levels of effort, at most")
    deepest: float = option(0.75, "share of the model that the lowest level leaves out, under 1")
    samples: int = option(64, "prompts that the levels are chosen by, at most")
    draws: int = option(5, "random choices to compare each level with; 0 for no comparison")
    combined: int = option(2, "depth settings, and expert settings, that are tried together")

    def run(self, calibration: Calibration) -> Part:
        """Measure.

        Raises:
            CalibrationError: an option is out of range, no answer has a second token, full depth
                has none of the tasks right, or the engine cannot run a setting.
        """
        self._check()
        every = units(calibration.model.layers, sub_layers=self.sub_layers)
        samples = calibration.samples
        levels = greedy_levels(
            calibration,
            [samples[i] for i in spaced_indices(self.samples, len(samples))],
            int(self.deepest * len(every)),
            sub_layers=self.sub_layers,
        )
        items = Items.of(calibration, self.items, self.prompts)
        at_once = max(self.batch, min(AT_ONCE, items.requests))
        with engine_of(calibration, items.longest, at_once) as engine:
            measure = SettingMeasure(calibration, engine, items, self.batch, self.timed)
            device = _device(calibration)
            # Other settings of the same model are measured beside those that are there.
            same = replace(
                self, sub_layers=False, levels=0, deepest=0.0, samples=0, draws=0, combined=0
            )
            key = key_of(calibration.key(same), device)
            kept = Measurements(measure, calibration.workspace, key)
            run = _Run(self, calibration, engine, kept, levels, items)
            points = run.points()
            allowance = Allowance.of(points, kept.noise(), items.measure)
            presets = choose(points, allowance)
            notes = tuple(shortfalls(points, presets, allowance))
            for note in notes:
                _LOG.warning("frontier: %s", note)
            found = FrontierFields(
                measure=items.measure,
                items=items.count,
                batch=self.batch,
                device=device,
                points=points,
                presets=presets,
                effort=run.effort(),
                equal_compute=run.equal_compute(),
                notes=notes,
                noise=kept.noise(),
                chosen_by=str(allowance),
            )
        return Part({"frontier": found.model_dump(mode="json")})

    def _check(self) -> None:
        least = {
            "items": 1,
            "prompts": 1,
            "batch": 1,
            "timed": 1,
            "repeats": LEAST_REPEATS,
            "levels": 1,
            "samples": 1,
            "draws": 0,
            "combined": 0,
        }
        check_least(self, least)
        if not 0 < self.deepest < 1:
            raise CalibrationError("frontier: deepest must lie between 0 and 1")


@dataclass(frozen=True)
class _Run:
    """One run of the step."""

    step: Frontier
    calibration: Calibration
    engine: OfflineEngine
    kept: Measurements
    levels: Sequence[GreedyLevel]
    items: Items

    def points(self) -> tuple[FrontierPoint, ...]:
        """All points, full depth first."""
        parts = profile_parts(self.calibration)
        fields, layers = parts["fields"], self.calibration.model.layers
        levels = [skip_setting(f"level {n}", without(self._left(n))) for n in self._counts()]
        depth = [*levels, *depth_settings(fields, parts["heads"].keys(), layers)]
        shape = self.engine.expert_answer["shape"]
        experts = [] if shape is None else [*expert_settings(fields, shape["top_k"])]
        found: dict[str, FrontierPoint] = {}
        self._measure([FULL_DEPTH, *depth, *experts], found)
        full = next(iter(found.values()))
        pairs = together(self._best(depth, full, found), self._best(experts, full, found))
        self._measure([*pairs], found)
        points = self._tested([*found.values()])
        kept = on_frontier([measures_of(point) for point in points])
        return tuple(
            point.model_copy(update={"on_frontier": keep})
            for point, keep in zip(points, kept, strict=True)
        )

    def _tested(self, points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
        """Points with the p-values of their being faster than full depth, which is the first.

        A repeat's ratio is of two times that were taken in turn, so Student's t-test is of the
        ratios' logarithms.
        """
        policies = [self.engine.resolve(point.routing) for point in points[1:]]
        raw = [mean_above(np.log(self.kept.ratios(p, self.step.repeats))) for p in policies]
        pairs = zip(points[1:], corrected(raw).tolist(), strict=True)
        return [points[0], *(point.model_copy(update={"faster": p}) for point, p in pairs)]

    def _measure(self, settings: Sequence[Setting], found: dict[str, FrontierPoint]) -> None:
        """Add points by digest of their policies; what is there already stays as it is."""
        for setting in self._tracked(settings, "settings"):
            policy = self._policy(setting)
            if policy.digest not in found:
                found[policy.digest] = self._point(setting, policy)

    def _policy(self, setting: Setting) -> RoutingPolicy:
        try:
            return self.engine.resolve(setting.routing)
        except RoutingError as error:
            message = f"setting {setting.name!r}: {error.param}: {error.message}"
            raise CalibrationError(message) from None

    def _point(self, setting: Setting, policy: RoutingPolicy) -> FrontierPoint:
        quality = self.kept.quality(policy)
        normalised = quality.normalised
        return FrontierPoint(
            name=setting.name,
            routing=dict(setting.routing),
            quality=self._interval(quality),
            speed=median_interval(self.kept.ratios(policy, self.step.repeats)),
            compute_fraction=quality.work.compute_fraction,
            generated_fraction=quality.generated_fraction,
            on_frontier=False,
            tokens=quality.tokens,
            normalised=None if normalised is None else share_interval(normalised, self.items.count),
        )

    def _interval(self, quality: Quality) -> Interval:
        """Of tasks Wilson's, of the agreement of tokens its own."""
        if self.items.tasks or quality.tokens is None:
            return share_interval(quality.value, self.items.count)
        return quality.tokens.agreement

    def _best(
        self, settings: Iterable[Setting], full: FrontierPoint, found: Mapping[str, FrontierPoint]
    ) -> list[Setting]:
        """The fastest of those that the preset with the most loss would allow."""
        allowance = Allowance.of([full], self.kept.noise(), self.items.measure)
        points = [(found[self._policy(setting).digest], setting) for setting in settings]
        # A setting that came to another's policy has no point of its own.
        allowed = [
            (point.speed.value, setting)
            for point, setting in points
            if point.name == setting.name and allowance.allows("fast", point)
        ]
        ordered = sorted(allowed, key=lambda entry: -entry[0])
        return [setting for _, setting in ordered[: self.step.combined]]

    def effort(self) -> tuple[EffortLevel, ...]:
        """The greedy levels, of which `step.levels` are spread evenly."""
        levels = []
        for count in self._counts():
            skip = without(self._left(count))
            quality, fraction = self._ablation_quality(skip_setting(f"level {count}", skip))
            levels.append(
                EffortLevel(
                    effort=fraction, attention=skip.attention, mlp=skip.mlp, quality=quality
                )
            )
        return tuple(levels)

    def equal_compute(self) -> tuple[EqualCompute, ...]:
        """The levels, and other choices of as many units."""
        if not self.step.draws:
            return ()
        tracked = self._tracked([*self._choices()], "other choices of as many units")
        return tuple(self._compared(*choice) for choice in tracked)

    def _choices(self) -> Iterator[tuple[_Chosen, int | None, Sequence[LayerUnit]]]:
        every = units(self.calibration.model.layers, sub_layers=self.step.sub_layers)
        for count in self._counts():
            yield "chain", None, self._left(count)
            yield "uniform", None, uniform(every, count)
            for number in range(self.step.draws):
                seed = self.calibration.seed + number
                yield "random", seed, drawn(every, count, seed)

    def _compared(
        self, chosen: _Chosen, seed: int | None, left: Sequence[LayerUnit]
    ) -> EqualCompute:
        quality, fraction = self._ablation_quality(skip_setting(chosen, without(left)))
        return EqualCompute(
            chosen=chosen,
            seed=seed,
            units=len(left),
            generated_fraction=fraction,
            quality=quality,
        )

    def _ablation_quality(self, setting: Setting) -> tuple[Interval, float]:
        """Quality, and compute on generated tokens."""
        found = self.kept.quality(self._policy(setting))
        return self._interval(found), found.generated_fraction

    def _counts(self) -> list[int]:
        """Units that the levels leave out."""
        return [place + 1 for place in spaced_indices(self.step.levels, len(self.levels))]

    def _left(self, count: int) -> list[LayerUnit]:
        return [level.unit for level in self.levels[:count]]

    def _tracked(self, things: Sequence[Any], what: str) -> Iterable[Any]:
        return self.calibration.track(things, what, len(things))


def _device(calibration: Calibration) -> str:
    if calibration.model.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
