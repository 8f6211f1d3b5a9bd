"""What settings are measured on: quality of their answers, and their pace beside full depth's.

Quality is exact match on tasks, or without tasks the agreement with full depth's own answers on the
prompts (`sluice.models.offline.calibrate.frontier.agreement`). It is measured on the very items
that presets are chosen by: what a preset promises on others is for `sluice eval` to say.

Pace is measured in batches in which every request generates as many tokens as full depth's answer
has, whatever they are: all settings then run the same batches of the same lengths, a setting that
never ends gains nothing by it, and early exits decide on the stretch that clients see. A setting
and full depth take turns at every batch, and which goes first alternates, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sluice.models.offline.calibrate.frontier.agreement import agreement
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Workspace
from sluice.models.offline.engine import OfflineEngine, Outcome
from sluice.models.offline.evaluate.work import Work
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.policy.policy import RoutingPolicy

AT_ONCE = 64
"""Requests at a time while quality is measured; it does not depend on them."""

Measure = Literal["exact match", "agreement"]


@dataclass(frozen=True)
class Items:
    """What is asked.

    Attributes:
        prompts: token ids.
        answers: right answers as texts, or None: full depth's own are the measure.
        ends: tokens that end an answer.
        new_tokens: most tokens of an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...] | None
    ends: frozenset[int]
    new_tokens: int

    @classmethod
    def of(cls, calibration: Calibration, most: int) -> Items:
        """Tasks if there are any, or else prompts; of more than `most`, as many evenly spread.

        Raises:
            CalibrationError: a prompt leaves no room for an answer.
        """
        examples = calibration.tasks or calibration.prompts
        chosen = [examples[place] for place in spaced_indices(most, len(examples))]
        answers = None
        if calibration.tasks:
            answers = tuple(example.answer or "" for example in chosen)
        return cls(
            tuple(calibration.encoded(chosen)),
            answers,
            calibration.model.ends,
            calibration.new_tokens,
        )

    @property
    def measure(self) -> Measure:
        """What quality is."""
        return "agreement" if self.answers is None else "exact match"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(map(len, self.prompts)) + self.new_tokens


@dataclass(frozen=True)
class Quality:
    """Of one setting.

    Attributes:
        value: mean over the items, between 0 and 1.
        work: what it took.
    """

    value: float
    work: Work

    @property
    def generated_fraction(self) -> float:
        """Share of full depth's compute on generated tokens, 1.0 without one."""
        fraction = self.work.generated_compute_fraction
        return 1.0 if fraction is None else fraction


class SettingMeasure:
    """Full depth's answers, and every setting held against them, in one engine."""

    def __init__(
        self,
        calibration: Calibration,
        engine: OfflineEngine,
        items: Items,
        batch: int,
        timed: int,
    ) -> None:
        """Ask at full depth.

        Args:
            calibration: its model reads tokens as text, its seed draws what is timed.
            engine: with room for `items.longest` tokens and `AT_ONCE` requests.
            items: what is asked.
            batch: requests at a time while pace is measured.
            timed: how many items pace is measured on, at most.

        Raises:
            CalibrationError: full depth has no answer right, or no answer has a second token, so
                that there is nothing to time.
        """
        self._decode = calibration.model.decode
        self._engine = engine
        self._items = items
        self._batch = batch
        outcome = self._answers(RoutingPolicy())
        self._full = outcome.tokens
        self.full = self._quality(outcome)
        """Quality of full depth."""
        if self.full.value == 0:
            raise CalibrationError("full depth has none of the tasks right: what could be lost?")
        long = [place for place, tokens in enumerate(self._full) if len(tokens) > 1]
        if not long:
            raise CalibrationError("no answer has a second token: there is nothing to time")
        drawn = random.Random(calibration.seed).sample(long, min(timed, len(long)))
        # Answers of like lengths side by side, so that batches stay full.
        self._timed = sorted(drawn, key=lambda place: (-len(self._full[place]), place))

    def quality(self, policy: RoutingPolicy) -> Quality:
        """Quality of a setting."""
        return self._quality(self._answers(policy))

    def _quality(self, outcome: Outcome) -> Quality:
        scores = [self._score(place, given) for place, given in enumerate(outcome.tokens)]
        return Quality(sum(scores) / len(scores), Work.of_records(outcome.records))

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        """Full depth's time over the setting's, repeat by repeat; above 1 is faster."""
        asked = None if policy.stock else policy
        self._pair(asked, 0)  # Warm-up.
        pairs = [self._pair(asked, repeat) for repeat in range(repeats)]
        return [full / own for full, own in pairs]

    def _pair(self, policy: RoutingPolicy | None, repeat: int) -> tuple[float, float]:
        """Seconds of full depth, and of a setting."""
        full = own = 0.0
        for number, start in enumerate(range(0, len(self._timed), self._batch)):
            places = self._timed[start : start + self._batch]
            if (number + repeat) % 2:
                full += self._seconds(places, None)
                own += self._seconds(places, policy)
            else:
                own += self._seconds(places, policy)
                full += self._seconds(places, None)
        return full, own

    def _answers(self, policy: RoutingPolicy) -> Outcome:
        items = self._items
        limits = [items.new_tokens] * len(items.prompts)
        return self._engine.answers(items.prompts, policy, limits, items.ends, AT_ONCE)

    def _score(self, place: int, given: Sequence[int]) -> float:
        if self._items.answers is None:
            return agreement(self._full[place], given)
        return float(self._decode(given).strip() == self._items.answers[place].strip())

    def _seconds(self, places: Sequence[int], policy: RoutingPolicy | None) -> float:
        prompts = [self._items.prompts[place] for place in places]
        limits = [len(self._full[place]) for place in places]
        return self._engine.answers(prompts, policy, limits, (), self._batch).seconds


_QUALITY = "frontier-quality"
_RATIOS = "frontier-ratios"


class Measurements:
    """Quality and pace by policy, as `SettingMeasure` finds them."""

    def __init__(self, measure: SettingMeasure, workspace: Workspace, key: str) -> None:
        """Take up what was measured before.

        Args:
            measure: finds what is missing.
            workspace: where it is kept.
            key: of all that a measurement depends on, but for the policy.
        """
        self._measure, self._workspace, self._key = measure, workspace, key
        self._qualities: dict[str, Any] = workspace.value(_QUALITY, key) or {}
        self._ratios: dict[str, Any] = workspace.value(_RATIOS, key) or {}

    def quality(self, policy: RoutingPolicy) -> Quality:
        """Quality of a policy, and its work."""
        if policy.digest not in self._qualities:
            measured = self._measure.quality(policy)
            work = measured.work
            self._qualities[policy.digest] = [
                measured.value,
                work.generated_tokens,
                work.mean_layers,
                work.compute_fraction,
                work.generated_compute_fraction,
            ]
            self._workspace.keep(_QUALITY, self._key, self._qualities)
        value, tokens, mean_layers, whole, generated = self._qualities[policy.digest]
        return Quality(value, Work(tokens, mean_layers, generated, whole))

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        """Full depth's time over the policy's, pair by pair."""
        if policy.digest not in self._ratios:
            self._ratios[policy.digest] = self._measure.ratios(policy, repeats)
            self._workspace.keep(_RATIOS, self._key, self._ratios)
        found: list[float] = self._ratios[policy.digest]
        return found
