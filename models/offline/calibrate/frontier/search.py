"""Skip sets found by search: which attentions and MLPs generated tokens leave out.

One choice a sub-layer, two objectives: quality, and measured time over full depth's. It is the
search of Draft & Verify (arXiv 2309.08168) over attention and MLP apart, with quality as a second
objective where self-speculation has one, since a draft is verified and an answer is not. Optuna's
tree-structured Parzen estimator proposes; the greedy levels
(`sluice.models.offline.calibrate.frontier.greedy_levels`) and what LLM-Drop's orders leave out
(arXiv 2406.15786) are tried first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from sluice.models.depth.skip_order import Importance, Unit, drop_order, skip_first
from sluice.models.offline.calibrate.frontier.greedy_levels import (
    LayerUnit,
    greedy_levels,
    level_samples,
)
from sluice.models.offline.calibrate.frontier.measure import AT_ONCE, SettingMeasure, timed_batches
from sluice.models.offline.calibrate.frontier.pareto import on_frontier
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.pipeline import engine_of
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part, key_of
from sluice.models.offline.hf_model.examples import spaced_indices
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet

if TYPE_CHECKING:
    from optuna.study import Study

_KEPT = "search-trials"
_SEED_SHARES = (0.125, 0.25, 0.375, 0.5)
"""Of the units of each order and of the greedy levels, what the first trials leave out."""
_CHOICES = (False, True)


@dataclass(frozen=True)
class Trial:
    """A skip set that was measured.

    Attributes:
        skip: generated tokens leave it out.
        quality: see `sluice.models.offline.calibrate.frontier.measure`.
        seconds: measured time over full depth's, median of the repeats.
    """

    skip: SkipSet
    quality: float
    seconds: float


@dataclass(frozen=True)
class Search(Step):
    """See the module. Every trial is kept: a search that was stopped goes on with the next."""

    name: ClassVar[str] = "search"
    help: ClassVar[str] = "skip sets found by search (Optuna)"
    needs: ClassVar[tuple[str, ...]] = ("importance",)
    reads_tasks: ClassVar[bool] = True
    measures_speed: ClassVar[bool] = True

    trials: int = option(60, "skip sets to measure")
    timeout: float = option(300.0, "seconds after which no further one is begun, in each run")
    items: int = option(96, "tasks that quality is measured on, at most")
    prompts: int = option(32, "prompts on which full depth's own tokens are compared, at most")
    batch: int = option(8, "requests at a time while time is measured")
    timed: int = option(16, "answers that time is measured on")
    repeats: int = option(3, "times that a skip set and full depth are timed in turn")
    samples: int = option(0, "prompts that the levels are chosen by; 0: by the number of layers")
    tried: int = option(4, "units tried for each level but the first; 0 for all of them")
    floor: float = option(0.5, "share of full depth's quality under which a set is not kept")

    def run(self, calibration: Calibration) -> Part:
        """Search, and keep what no other set beats in quality and time.

        Raises:
            CalibrationError: an option is out of range, no answer has a second token, or full depth
                has none of the tasks right.
        """
        positive = ("trials", "items", "prompts", "batch", "timed", "repeats")
        check_least(self, {**dict.fromkeys(positive, 1), "samples": 0, "tried": 0})
        # More trials go on from those that are there.
        asked = calibration.key(replace(self, trials=0, timeout=0.0))
        kept = _Kept(calibration, key_of(asked, str(calibration.model.device)))
        first = seeds(
            calibration.model.layers, _importance(calibration), self._greedy_blocks(calibration)
        )
        items = Items.of(calibration, self.items, self.prompts)
        at_once = max(self.batch, min(AT_ONCE, items.requests))
        with engine_of(calibration, items.longest, at_once) as engine, _quiet():
            measure = SettingMeasure(calibration, engine, items, self.batch, self.timed)
            study = _study(calibration, kept.trials, first)
            until = time.monotonic() + self.timeout
            left = range(len(kept.trials), self.trials)
            for _ in calibration.track(left, "skip sets", len(left)):
                if time.monotonic() > until:
                    break
                self._try(study, measure, kept, calibration)
        least = self.floor * measure.full.value
        found = [trial for trial in kept.trials if trial.quality >= least]
        return Part({"skip_sets": dict(_named(found))})

    def passes(self, calibration: Calibration) -> float:
        """See `Step.passes`."""
        prompts = max(len(calibration.prompts), 1)
        asked = min(self.prompts, prompts) + 2 * min(self.items, len(calibration.tasks))
        return self.trials * asked / prompts

    def timed_batches(self, calibration: Calibration) -> float:
        """See `Step.timed_batches`."""
        timed = min(self.timed, len(calibration.prompts))
        return self.trials * timed_batches(timed, self.batch, self.repeats)

    def _greedy_blocks(self, calibration: Calibration) -> Sequence[LayerUnit]:
        """Blocks in the order in which the greedy levels leave them out."""
        samples = calibration.samples
        count = level_samples(calibration.model.layers, self.samples)
        read = [samples[i] for i in spaced_indices(count, len(samples))]
        length = round(_SEED_SHARES[-1] * calibration.model.layers)
        levels = greedy_levels(calibration, read, length, sub_layers=False, tried=self.tried)
        return [level.unit for level in levels]

    def _try(
        self, study: Study, measure: SettingMeasure, kept: _Kept, calibration: Calibration
    ) -> None:
        """One trial; what was tried before is not measured again."""
        layers = calibration.model.layers
        # A sampler of its own for each trial: a search that was stopped proposes the same sets.
        study.sampler = _sampler(calibration.seed, len(kept.trials))
        trial = study.ask(_choices(layers))
        skip = _skip_of(trial.params, layers)
        known = next((each for each in kept.trials if each.skip == skip), None)
        if known is None:
            known = self._measured(skip, measure, layers)
        study.tell(trial, [known.quality, known.seconds])
        kept.add(known)

    def _measured(self, skip: SkipSet, measure: SettingMeasure, layers: int) -> Trial:
        if len(skip.attention) == len(skip.mlp) == layers:
            return Trial(skip, 0.0, 1.0)  # No engine runs it: as bad as can be, at no gain.
        policy = RoutingPolicy(skip)
        quality = measure.quality(policy).value
        return Trial(skip, quality, 1 / median(measure.ratios(policy, self.repeats)))


class _Kept:
    """Trials in order, in the workspace."""

    def __init__(self, calibration: Calibration, key: str) -> None:
        self._workspace, self._key = calibration.workspace, key
        held: list[Any] = self._workspace.value(_KEPT, key) or []
        self.trials = [
            Trial(SkipSet.of(attention=tuple(a), mlp=tuple(m), phase=Phase.DECODE), quality, ratio)
            for a, m, quality, ratio in held
        ]

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        wire = [[t.skip.attention, t.skip.mlp, t.quality, t.seconds] for t in self.trials]
        self._workspace.keep(_KEPT, self._key, wire)


def seeds(layers: int, importance: Importance | None, nested: Sequence[LayerUnit]) -> list[SkipSet]:
    """What is tried first: full depth, then shares of each order, the smallest first.

    Args:
        layers: of the model.
        importance: that LLM-Drop orders units by; None leaves its orders out.
        nested: blocks in the order of the greedy levels.
    """
    orders: list[Sequence[LayerUnit]] = [nested]
    if importance is not None:
        orders += [drop_order(unit, layers, importance) for unit in Unit]
    found = [SkipSet(phase=Phase.DECODE)]
    for share in _SEED_SHARES:
        for order in orders:
            whole = layers if order is nested else len(order)
            skip = skip_first(order, round(share * whole), Phase.DECODE)
            if skip not in found:
                found.append(skip)
    return found


def _study(calibration: Calibration, done: list[Trial], first: Sequence[SkipSet]) -> Study:
    """A study that knows the trials so far, and what to try first."""
    import optuna

    layers = calibration.model.layers
    study = optuna.create_study(directions=["maximize", "minimize"])
    distributions = _choices(layers)
    for trial in done:
        study.add_trial(
            optuna.trial.create_trial(
                params=_params(trial.skip, layers),
                distributions=distributions,
                values=[trial.quality, trial.seconds],
            )
        )
    for skip in first[len(done) :]:
        study.enqueue_trial(_params(skip, layers))
    return study


def _importance(calibration: Calibration) -> Importance | None:
    part = calibration.parts.get("importance")
    found = None if part is None else part.fields.get("importance")
    return None if found is None else {Unit(unit): values for unit, values in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines between the progress bars."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _sampler(seed: int, number: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(seed=seed * 100_003 + number, multivariate=True)


def _choices(layers: int) -> dict[str, Any]:
    import optuna

    names = _params(SkipSet(), layers)
    return {name: optuna.distributions.CategoricalDistribution(_CHOICES) for name in names}


def _params(skip: SkipSet, layers: int) -> dict[str, bool]:
    """Whether each sub-layer is left out, as Optuna's parameters."""
    attention = {f"attention.{layer}": layer in skip.attention for layer in range(layers)}
    return attention | {f"mlp.{layer}": layer in skip.mlp for layer in range(layers)}


def _skip_of(params: Mapping[str, bool], layers: int) -> SkipSet:
    """Inverse of `_params`."""
    attention, mlp = (
        tuple(layer for layer in range(layers) if params[f"{module}.{layer}"])
        for module in ("attention", "mlp")
    )
    return SkipSet.of(attention=attention, mlp=mlp, phase=Phase.DECODE)


def _named(trials: list[Trial]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The Pareto set of the trials, the best first; full depth is no skip set."""
    kept = on_frontier([(trial.quality, 1 / trial.seconds, 0.0) for trial in trials])
    best: dict[SkipSet, Trial] = {}
    for trial, keep in zip(trials, kept, strict=True):
        if keep and not trial.skip.empty:
            best.setdefault(trial.skip, trial)
    ordered = sorted(best.values(), key=lambda trial: (-trial.quality, trial.seconds))
    for number, trial in enumerate(ordered, 1):
        yield (
            f"search-{number}",
            {
                "attention": list(trial.skip.attention),
                "mlp": list(trial.skip.mlp),
                "quality": trial.quality,
                "seconds": trial.seconds,
            },
        )
