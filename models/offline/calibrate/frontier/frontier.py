"""Step: settings of depth and experts measured together, and what presets and `effort` are."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from sluice.models.offline.calibrate.frontier.greedy_levels import (
    GreedyLevel,
    LayerUnit,
    drawn,
    greedy_levels,
    level_samples,
    uniform,
    units,
    without,
)
from sluice.models.offline.calibrate.frontier.measure import (
    AT_ONCE,
    Measurements,
    SettingMeasure,
    timed_batches,
)
from sluice.models.offline.calibrate.frontier.nearly_free import families
from sluice.models.offline.calibrate.frontier.pareto import choose, shortfalls
from sluice.models.offline.calibrate.frontier.points import DIGITS, Points
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
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.offline.intervals import LEAST_REPEATS
from sluice.models.profile.frontier_fields import EffortLevel, EqualCompute, FrontierFields
from sluice.models.profile.values import Interval

_TIMED_SETTINGS = 20
"""What is not timed loses too much; for the estimate."""
_LOG = logging.getLogger(__name__)
_Chosen = Literal["chain", "uniform", "random"]


@dataclass(frozen=True)
class Frontier(Step):
    """Measures what the other steps found, in one engine; see `SettingMeasure` for how.

    Candidates are the greedy levels
    (`sluice.models.offline.calibrate.frontier.greedy_levels`), those of
    `sluice.models.offline.calibrate.frontier.settings`, and what is nearly free
    (`sluice.models.offline.calibrate.frontier.nearly_free`); then the best of depth with the best
    of experts. A setting that gives fewer than `least` of full depth's tokens is not timed.
    Intervals are at 95 %: Wilson's for quality, between order statistics for the median speed.

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
        "recover",
    )
    reads_tasks: ClassVar[bool] = True
    measures_speed: ClassVar[bool] = True

    items: int = option(400, "tasks that quality is measured on, at most")
    prompts: int = option(64, "prompts on which full depth's own tokens are compared, at most")
    batch: int = option(8, "requests at a time while speed is measured")
    timed: int = option(16, "answers that speed is measured on")
    repeats: int = option(7, "times that a setting and full depth are timed in turn, at least 6")
    sub_layers: bool = option(False, "levels leave out attentions and MLPs one by one, not blocks")
    levels: int = option(8, "levels of effort, at most")
    deepest: float = option(0.75, "share of the model that the lowest level leaves out, under 1")
    samples: int = option(0, "prompts that the levels are chosen by; 0: by the number of layers")
    tried: int = option(4, "units tried for each level but the first; 0 for all of them")
    least: float = option(0.5, "share of full depth's tokens under which a setting is not timed")
    draws: int = option(2, "random choices to compare each level with; 0 for no comparison")
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
        count = level_samples(calibration.model.layers, self.samples)
        levels = greedy_levels(
            calibration,
            [samples[i] for i in spaced_indices(count, len(samples))],
            int(self.deepest * len(every)),
            sub_layers=self.sub_layers,
            tried=self.tried,
        )
        items = Items.of(calibration, self.items, self.prompts)
        at_once = max(self.batch, min(AT_ONCE, items.requests))
        with engine_of(calibration, items.longest, at_once) as engine:
            measure = SettingMeasure(calibration, engine, items, self.batch, self.timed)
            device = _device(calibration)
            # Other settings of the same model are measured beside those that are there.
            same = replace(
                self,
                sub_layers=False,
                levels=0,
                deepest=0.0,
                samples=0,
                tried=0,
                least=0.0,
                draws=0,
                combined=0,
            )
            key = key_of(calibration.key(same), device)
            kept = Measurements(measure, calibration.workspace, key)
            points = Points(engine, kept, items, self.repeats, self.least, calibration.track)
            run = _Run(self, calibration, points, levels)
            run.measure()
            measured, allowance = points.points(), points.allowance
            presets = choose(measured, allowance)
            notes = tuple(shortfalls(measured, presets, allowance))
            for note in notes:
                _LOG.warning("frontier: %s", note)
            found = FrontierFields(
                measure=items.measure,
                items=items.count,
                batch=self.batch,
                device=device,
                mode=engine.mode,
                points=measured,
                presets=presets,
                effort=run.effort(),
                equal_compute=run.equal_compute(),
                notes=notes,
                noise=kept.noise(),
                chosen_by=str(allowance),
                failed=tuple(points.failed.values()),
            )
        return Part({"frontier": found.model_dump(mode="json")})

    def passes(self, calibration: Calibration) -> float:
        """See `Step.passes`."""
        layers = calibration.model.layers
        prompts = max(len(calibration.prompts), 1)
        units = layers * (1 + self.sub_layers)
        rounds = self.deepest * units * (self.tried or units / 2)
        chain = (units + rounds) * min(level_samples(layers, self.samples), prompts)
        families = 6 * 3 * math.log2(max(self.deepest * layers, 2))
        asked = min(self.prompts, prompts) + 2 * min(self.items, len(calibration.tasks))
        quality = (families + _TIMED_SETTINGS + self.levels * (self.draws + 1)) * asked
        return (chain + quality) / prompts

    def timed_batches(self, calibration: Calibration) -> float:
        """See `Step.timed_batches`."""
        timed = min(self.timed, len(calibration.prompts))
        return _TIMED_SETTINGS * timed_batches(timed, self.batch, self.repeats)

    def _check(self) -> None:
        least = {
            "items": 1,
            "prompts": 1,
            "batch": 1,
            "timed": 1,
            "repeats": LEAST_REPEATS,
            "levels": 1,
            "samples": 0,
            "tried": 0,
            "draws": 0,
            "combined": 0,
        }
        check_least(self, least)
        if not 0 < self.deepest < 1:
            raise CalibrationError("frontier: deepest must lie between 0 and 1")


def _device(calibration: Calibration) -> str:
    if calibration.model.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"


@dataclass(frozen=True)
class _Run:
    """One run of the step."""

    step: Frontier
    calibration: Calibration
    points: Points
    levels: Sequence[GreedyLevel]

    def measure(self) -> None:
        """Measure all points, full depth first."""
        parts = profile_parts(self.calibration)
        fields, layers = parts["fields"], self.calibration.model.layers
        levels = [skip_setting(f"level {n}", without(self._left(n))) for n in self._counts()]
        depth = [*levels, *depth_settings(fields, parts["heads"].keys(), layers)]
        shape = self.points.engine.expert_answer["shape"]
        experts = [] if shape is None else [*expert_settings(fields, shape["top_k"])]
        self.points.measure([FULL_DEPTH])
        chain = [] if self.step.sub_layers else self._left(len(self.levels))
        deepest = int(self.step.deepest * layers)
        depth += self.points.refined(families(fields, chain, layers, deepest))
        self.points.measure([*depth, *experts])
        best = [self.points.best(each, self.step.combined) for each in (depth, experts)]
        self.points.measure([*together(*best)])

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
        points = self.points
        found = points.kept.quality(points.policy(setting))
        return points.interval(found), round(found.generated_fraction, DIGITS)

    def _counts(self) -> list[int]:
        """Units that the levels leave out."""
        return [place + 1 for place in spaced_indices(self.step.levels, len(self.levels))]

    def _left(self, count: int) -> list[LayerUnit]:
        return [level.unit for level in self.levels[:count]]

    def _tracked(self, things: Sequence[Any], what: str) -> Iterable[Any]:
        return self.calibration.track(things, what, len(things))
