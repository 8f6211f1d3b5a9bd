"""A step of a calibration, and what it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from sluice.models.offline.calibrate.workspace import Part, Workspace, key_of
from sluice.models.offline.hf_model.examples import CalibrationError, Example, digest
from sluice.models.offline.hf_model.hooks import continued
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""(things, what is done, how many there are) to the things, with a progress bar moving."""


@dataclass(frozen=True)
class Step(ABC):
    """One step; its dataclass fields are its options, made with `option`."""

    name: ClassVar[str]
    help: ClassVar[str]
    """What it finds, in a line."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Steps whose results it reads, if they are to be had."""
    needs_experts: ClassVar[bool] = False
    needs_several_experts: ClassVar[bool] = False
    """It chooses among the experts of a token."""
    only_named: ClassVar[bool] = False
    """No part of a whole run; its own command runs it."""
    reads_tasks: ClassVar[bool] = False
    measures_speed: ClassVar[bool] = False
    """It times an engine, and so depends on how that runs the model."""

    @abstractmethod
    def run(self, calibration: Calibration) -> Part:
        """Do it.

        Raises:
            CalibrationError: the examples do not allow it.
        """

    def passes(self, calibration: Calibration) -> float:  # noqa: ARG002 - of most one is enough
        """How much it reads, in passes over the prompts and their answers; a rough guess."""
        return 1.0

    def timed_batches(self, calibration: Calibration) -> float:  # noqa: ARG002 - most time none
        """How many batches of answers it generates to time them; a rough guess."""
        return 0.0

    def refusal(self, calibration: Calibration) -> str | None:
        """Why the step has nothing to do with this model or these examples, or None."""
        if self.needs_experts and not calibration.model.family.moe:
            return f"{calibration.model.family.name} has no mixture-of-experts layers"
        if self.needs_experts and not calibration.model.has_experts:
            return "none of the model's layers has experts"
        if self.needs_several_experts and calibration.model.config.num_experts_per_tok == 1:
            return "the model runs one expert per token"
        return None

    def check(self, calibration: Calibration) -> None:
        """Refuse to run where there is nothing to do.

        Raises:
            CalibrationError: names the step and the reason.
        """
        reason = self.refusal(calibration)
        if reason is not None:
            raise CalibrationError(f"{self.name}: {reason}")

    @property
    def settings(self) -> dict[str, Any]:
        """Its options, as JSON values."""
        return asdict(self)


def option(default: Any, help_text: str) -> Any:
    """A field of a step that is an option of the command line; int, float, str or bool."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class Calibration:
    """What the steps share.

    Attributes:
        model: the model.
        prompts: examples of `--prompts`.
        tasks: examples of `--tasks`; may be empty.
        new_tokens: most tokens of a continuation.
        seed: of everything that is drawn.
        workspace: where results are kept.
        track: makes progress visible.
        eager: speed is measured in an engine that compiles nothing, as `--enforce-eager` serves.
        parts: results of steps that are done, by name.
        skipped: steps that cannot be done, and why.
    """

    model: HFModel
    prompts: tuple[Example, ...]
    tasks: tuple[Example, ...]
    new_tokens: int
    seed: int
    workspace: Workspace
    track: Track
    eager: bool = False
    parts: dict[str, Part] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Each prompt with the model's own greedy answer at full depth.

        Raises:
            CalibrationError: a prompt and its continuation are longer than the context.
        """
        ids = [list(each) for each in self.encoded(self.prompts)]
        key = key_of(self.model.fingerprint, ids, self.new_tokens)
        held = self.workspace.value("continuations", key) or [[]] * len(ids)
        missing = [place for place, answer in enumerate(held) if not answer]
        asked = [tuple(ids[place]) for place in missing]
        parts = continued(self.model, asked, self.new_tokens) if asked else ()
        # A part is prompts of one length, and there are at most as many parts as prompts.
        lengths = len({*map(len, asked)})
        for places, samples in self.track(parts, "full depth's own answers", lengths):
            for place, sample in zip(places, samples, strict=True):
                held[missing[place]] = list(sample.answer)
            self.workspace.keep("continuations", key, held)
        return tuple(Sample(tuple(p), tuple(a)) for p, a in zip(ids, held, strict=True))

    def encoded(self, examples: Iterable[Example]) -> Iterator[tuple[int, ...]]:
        """Token ids of prompts.

        Raises:
            CalibrationError: one leaves no room for a continuation in the model's context.
        """
        room = self.model.context - self.new_tokens
        for example in examples:
            ids = self.model.encode(example)
            if not ids:
                raise CalibrationError(f"{example.where}: no tokens")
            if len(ids) > room:
                raise CalibrationError(
                    f"{example.where}: {len(ids)} tokens, and the model's context of "
                    f"{self.model.context} leaves room for {room} before {self.new_tokens} new"
                )
            yield ids

    def key(self, step: Step) -> str:
        """Of all that a step's result depends on."""
        needed = [self.key_of_part(name) for name in step.needs]
        data = [digest(self.prompts), digest(self.tasks) if step.reads_tasks else None]
        common = [self.model.fingerprint, str(self.model.dtype), self.new_tokens, self.seed]
        if step.measures_speed:
            common.append("eager" if self.eager else "compiled")
        return key_of(step.name, step.settings, common, data, needed)

    def key_of_part(self, name: str) -> str | None:
        """Digest of an earlier step's result, or None if there is none."""
        part = self.parts.get(name)
        if part is None:
            return None
        return key_of(part.fields, part.tensor_digests())


def check_least(step: Step, least: Mapping[str, int]) -> None:
    """Refuse options that are too small.

    Args:
        step: whose options they are.
        least: by name.

    Raises:
        CalibrationError: names the step and the option.
    """
    for name, low in least.items():
        if getattr(step, name) < low:
            raise CalibrationError(f"{step.name}: {name} must be at least {low}")
