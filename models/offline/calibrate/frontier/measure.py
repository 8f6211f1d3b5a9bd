"""What settings are measured on: quality of their answers, and their pace beside full depth's.

Quality is the share of tasks that are answered right. A task with choices is right if the right one
is the likeliest, each choice being generated after the prompt as an answer would be: its first
token comes from the prompt, the others from steps that the setting acts on. Other tasks are right
if the greedy answer is. Beside it stands what a setting makes of full depth's own tokens
(`TokenMeasures`), on the prompts; without tasks their agreement is the quality. All of it is
measured on the very items that presets are chosen by: what a preset promises on others is for
`sluice eval` to say.

Pace is measured in batches in which every request generates as many tokens as full depth's answer
has, whatever they are: all settings then run the same batches of the same lengths, a setting that
never ends gains nothing by it, and early exits decide on the stretch that clients see. A setting
and full depth take turns at every batch, and which goes first alternates, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from sluice.models.offline.calibrate.frontier.token_measures import token_measures
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Workspace
from sluice.models.offline.engine import OfflineEngine
from sluice.models.offline.evaluate.work import Work
from sluice.models.offline.forced import Text, read_forced
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.frontier_fields import TokenMeasures

AT_ONCE = 64
"""Requests at a time while quality is measured; it depends on them by rounding alone."""

_TOP = 64
"""Likeliest tokens of full depth at each place, between which distributions are compared."""


@dataclass(frozen=True)
class Quality:
    """Of one setting.

    Attributes:
        value: mean over the items, between 0 and 1.
        work: what the prompts' answers took.
        tokens: what it makes of full depth's own tokens.
        normalised: as `value`, with the log likelihoods of choices per character; None without
            choices.
    """

    value: float
    work: Work
    tokens: TokenMeasures | None = None
    normalised: float | None = None

    @property
    def generated_fraction(self) -> float:
        """Share of full depth's compute on generated tokens, 1.0 without one."""
        fraction = self.work.generated_compute_fraction
        return 1.0 if fraction is None else fraction

    def to_wire(self) -> dict[str, Any]:
        """As JSON values."""
        work = self.work
        return {
            "value": self.value,
            "normalised": self.normalised,
            "tokens": None if self.tokens is None else self.tokens.model_dump(),
            "work": [
                work.generated_tokens,
                work.mean_layers,
                work.generated_compute_fraction,
                work.compute_fraction,
            ],
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Inverse of `to_wire`."""
        tokens = wire["tokens"] and TokenMeasures.model_validate(wire["tokens"])
        return cls(wire["value"], Work(*wire["work"]), tokens, wire["normalised"])


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
        self._read: dict[str, tuple[TokenMeasures, Work]] = {}
        self._items = items
        self._batch = batch
        limits = [items.new_tokens] * len(items.prompts)
        self._full = engine.answers(items.prompts, None, limits, items.ends, AT_ONCE).tokens
        long = [place for place, tokens in enumerate(self._full) if len(tokens) > 1]
        if not long:
            raise CalibrationError("no answer has a second token: there is nothing to time")
        stock = RoutingPolicy()
        texts = [Text(items.prompts[place], self._full[place]) for place in long]
        read, _ = read_forced(engine, texts, stock, AT_ONCE, top=_TOP)
        self._texts = [
            Text(text.prompt, text.tokens, own.top) for text, own in zip(texts, read, strict=True)
        ]
        self.full = self.quality(stock)
        """Quality of full depth."""
        if self.full.value == 0:
            raise CalibrationError("full depth has none of the tasks right: what could be lost?")
        drawn = random.Random(calibration.seed).sample(long, min(timed, len(long)))
        # Answers of like lengths side by side, so that batches stay full.
        self._timed = sorted(drawn, key=lambda place: (-len(self._full[place]), place))

    def quality(self, policy: RoutingPolicy) -> Quality:
        """Quality of a setting."""
        tokens, work = self.tokens(policy)
        if not self._items.tasks:
            return Quality(tokens.agreement.value, work, tokens)
        right = self._right(policy)
        plain, normalised = (sum(each) / len(right) for each in zip(*right, strict=True))
        choices = any(task.choices for task in self._items.tasks)
        return Quality(plain, work, tokens, normalised if choices else None)

    def tokens(self, policy: RoutingPolicy) -> tuple[TokenMeasures, Work]:
        """What a setting makes of full depth's own tokens, and what they take."""
        if policy.digest not in self._read:
            read, records = read_forced(self._engine, self._texts, policy, AT_ONCE)
            found = token_measures(self._texts, read), Work.of_records(records)
            self._read[policy.digest] = found
        return self._read[policy.digest]

    def noise(self) -> TokenMeasures:
        """Full depth against itself: the same texts in another order, and fewer at a time."""
        texts = self._texts[::-1]
        batch = min(self._batch, max(1, len(texts) // 2))
        read, _ = read_forced(self._engine, texts, RoutingPolicy(), batch)
        return token_measures(texts, read)

    def _right(self, policy: RoutingPolicy) -> list[tuple[bool, bool]]:
        """Whether each task is answered right: plain, and with choices normalised."""
        tasks, items = self._items.tasks, self._items
        free = [task for task in tasks if not task.choices]
        limits = [items.new_tokens] * len(free)
        prompts = [task.prompt for task in free]
        given = iter(self._engine.answers(prompts, policy, limits, items.ends, AT_ONCE).tokens)
        texts = [Text(task.prompt, tokens) for task in tasks for tokens in task.choice_tokens]
        read = iter(read_forced(self._engine, texts, policy, AT_ONCE)[0])
        found = []
        for task in tasks:
            if task.choices:
                own = islice(read, len(task.choices))
                found.append(task.right([each.log_probs.tolist() for each in own]))
            else:
                right = self._decode(next(given)).strip() == task.answer.strip()
                found.append((right, right))
        return found

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

    def _seconds(self, places: Sequence[int], policy: RoutingPolicy | None) -> float:
        prompts = [self._items.prompts[place] for place in places]
        limits = [len(self._full[place]) for place in places]
        return self._engine.answers(prompts, policy, limits, (), self._batch).seconds


_QUALITY = "frontier-quality"
_RATIOS = "frontier-ratios"
_NOISE = "frontier-noise"
_TOKENS = "frontier-tokens"


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
        self._tokens: dict[str, Any] = workspace.value(_TOKENS, key) or {}

    def tokens(self, policy: RoutingPolicy) -> TokenMeasures:
        """What a policy makes of full depth's tokens."""
        if policy.digest not in self._tokens:
            self._tokens[policy.digest] = self._measure.tokens(policy)[0].model_dump()
            self._workspace.keep(_TOKENS, self._key, self._tokens)
        return TokenMeasures.model_validate(self._tokens[policy.digest])

    def quality(self, policy: RoutingPolicy) -> Quality:
        """Quality of a policy, and its work."""
        if policy.digest not in self._qualities:
            self._qualities[policy.digest] = self._measure.quality(policy).to_wire()
            self._workspace.keep(_QUALITY, self._key, self._qualities)
        return Quality.from_wire(self._qualities[policy.digest])

    def noise(self) -> TokenMeasures:
        """Full depth against itself."""
        held = self._workspace.value(_NOISE, self._key)
        if held is None:
            held = self._measure.noise().model_dump()
            self._workspace.keep(_NOISE, self._key, held)
        return TokenMeasures.model_validate(held)

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        """Full depth's time over the policy's, pair by pair."""
        if policy.digest not in self._ratios:
            self._ratios[policy.digest] = self._measure.ratios(policy, repeats)
            self._workspace.keep(_RATIOS, self._key, self._ratios)
        found: list[float] = self._ratios[policy.digest]
        return found


def timed_batches(timed: int, batch: int, repeats: int) -> int:
    """Batches that a setting's speed takes: its own and full depth's, with a warm-up of both.

    Args:
        timed: answers.
        batch: requests at a time.
        repeats: times that both are timed in turn.
    """
    return 2 * (repeats + 1) * math.ceil(timed / batch)
