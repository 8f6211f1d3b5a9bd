"""A scenario file: what is asked, when, under which policies, and what counts as good.

Every field is checked before anything runs; unknown keys are errors that name the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sluice.models.demo.tasks import TASKS

SHIPPED = Path(__file__).parent / "scenarios"
FULL_DEPTH = "full depth"
ALL = "all"
"""Turn of a scenario without turns, and policy of a row that takes all of them together."""
UNSCRAPED, SCRAPED = "unscraped", "scraped"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Streams = Annotated[int, Field(ge=1, le=4096)]
Turns = Literal["policies", "scraping"]


class ScenarioError(Exception):
    """A scenario that cannot be played; the message names the file and the field."""


class _Fields(BaseModel):
    """Base of everything in a scenario file: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Prompts(_Fields):
    """What is asked.

    Attributes:
        tasks: weight of each of the demo model's tasks.
        split: of the tasks' items.
        characters: at least so many a prompt: solved items of the same mix come before the
            question. None asks the question alone.
        max_tokens: of an answer.
        ignore_eos: every answer has `max_tokens` tokens, so that runs are of equal work.
    """

    tasks: dict[str, Positive] = dict.fromkeys(TASKS, 1.0)
    split: Literal["train", "heldout"] = "heldout"
    characters: Annotated[int, Field(ge=1, le=960)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 48
    ignore_eos: bool = False

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, float]) -> dict[str, float]:
        unknown = sorted(tasks.keys() - set(TASKS))
        if unknown or not tasks:
            raise ValueError(f"unknown task {unknown[:1]}; known: {', '.join(TASKS)}")
        return tasks


class Bursts(_Fields):
    """Bursts on top of a rate: every `every` seconds, `factor` times the rate for `seconds`."""

    factor: Annotated[float, Field(gt=1)]
    every: Positive
    seconds: Positive

    @model_validator(mode="after")
    def _shorter(self) -> Self:
        if self.seconds >= self.every:
            raise ValueError("seconds must be less than every: a burst has to end")
        return self


class Saturation(_Fields):
    """The rate is measured: what `streams` clients get answered, each asking again at once."""

    streams: Streams
    seconds: Positive


class Arrivals(_Fields):
    """When requests come.

    Attributes:
        process: at a rate, whatever the server does, with equal gaps or exponential ones; or
            `concurrent`: so many clients, each asking again once it has its answer.
        streams: clients of `concurrent`.
        rate: requests per second.
        saturation: instead of a rate, how to measure the server's saturating one.
        stages: multiples of the rate, one after the other; each starts when the one before has
            been answered. A ramp to overload goes beyond 1.
        bursts: on top of the rate.
    """

    process: Literal["constant", "poisson", "concurrent"]
    streams: Streams | None = None
    rate: Positive | None = None
    saturation: Saturation | None = None
    stages: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    bursts: Bursts | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        closed = self.process == "concurrent"
        for name in ("rate", "saturation", "stages", "bursts") if closed else ("streams",):
            if name in self.model_fields_set:
                raise ValueError(f"{name} does not go with process: {self.process}")
        if closed and self.streams is None:
            raise ValueError("streams is missing")
        if not closed and (self.rate is None) == (self.saturation is None):
            raise ValueError("give either rate or saturation")
        return self


class Policy(_Fields):
    """A policy of the mix: a preset, a routing object, or neither, which is full depth."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    weight: Positive = 1.0
    preset: str | None = None
    routing: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, dict) and "name" not in given:
            return {**given, "name": given.get("preset", FULL_DEPTH)}
        return given

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.preset is not None and self.routing is not None:
            raise ValueError("preset and routing exclude each other")
        return self

    @property
    def body(self) -> dict[str, Any]:
        """What the policy adds to a request's body."""
        routing = {"preset": self.preset} if self.preset is not None else self.routing
        return {} if routing is None else {"routing": routing}


class Objectives(_Fields):
    """A request is good if it was answered and kept all of these, in milliseconds."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2el_ms: Positive | None = None

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("give at least one of ttft_ms, tpot_ms, e2el_ms")
        return self


class Disconnects(_Fields):
    """Clients that leave.

    Attributes:
        share: of the requests (of the clients, where arrivals are `concurrent`).
        after_tokens: fewest and most tokens that they wait for.
    """

    share: Share
    after_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

    @field_validator("after_tokens")
    @classmethod
    def _ordered(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        if bounds[0] > bounds[1]:
            raise ValueError("the first number must not be above the second")
        return bounds


class Bars(_Fields):
    """What the run has to reach; a bar that is missed makes the exit status 1.

    Attributes:
        throughput_kept: throughput of the last stage over the best stage's.
        memory_mb_per_1000: growth of the server's memory per 1,000 requests, after warm-up.
        scrape_p99_ms: 99th percentile of the time of a scrape.
        scraped_throughput: decode throughput while scraping over that without.
        goodput_ratio: goodput of every other policy over the first one's.
    """

    throughput_kept: Share | None = None
    memory_mb_per_1000: Positive | None = None
    scrape_p99_ms: Positive | None = None
    scraped_throughput: Positive | None = None
    goodput_ratio: Positive | None = None


class Scenario(_Fields):
    """A load test.

    Attributes:
        description: one sentence.
        seed: of prompts, their order, arrivals, and who disconnects.
        duration: seconds that requests keep coming, of each stage.
        warm_up: seconds of traffic of all policies before anything is measured.
        deadline: seconds without a byte after which a request counts as hung.
        rounds: how often everything is measured.
        turns: what takes turns within a round, or None: all policies at once.
        scrape_every: seconds between scrapes of `/metrics`, or None.
        memory: whether the server's memory is watched; it has to be on this machine.
        metrics: whether the server has a `/metrics` to read.
    """

    description: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    duration: Positive
    warm_up: Annotated[float, Field(ge=0)] = 5.0
    deadline: Positive = 120.0
    rounds: Annotated[int, Field(ge=1)] = 1
    turns: Turns | None = None
    scrape_every: Positive | None = None
    memory: bool = True
    metrics: bool = True
    prompts: Prompts = Prompts()
    arrivals: Arrivals
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)] = (Policy(name=FULL_DEPTH),)
    objectives: Objectives
    disconnects: Disconnects | None = None
    bars: Bars = Bars()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError("policies: two have the same name")
        if self.turns == "policies" and len(names) < 2:
            raise ValueError("turns: policies needs at least two of them")
        if self.turns == "scraping" and self.scrape_every is None:
            raise ValueError("turns: scraping needs scrape_every")
        if self.scrape_every is not None and not self.metrics:
            raise ValueError("scrape_every does not go with metrics: false")
        if self.disconnects is not None and self.disconnects.after_tokens[1] > self.max_tokens:
            raise ValueError("disconnects.after_tokens: more than prompts.max_tokens")
        self._check_bars()
        return self

    def _check_bars(self) -> None:
        needs = {
            "throughput_kept": len(self.arrivals.stages) > 1,
            "memory_mb_per_1000": self.memory,
            "scrape_p99_ms": self.scrape_every is not None,
            "scraped_throughput": self.turns == "scraping",
            "goodput_ratio": self.turns == "policies",
        }
        for name in self.bars.model_dump(exclude_none=True):
            if not needs[name]:
                raise ValueError(f"bars.{name}: this scenario does not measure it")

    @property
    def turn_names(self) -> tuple[str, ...]:
        """What takes turns; the others are compared with the first."""
        if self.turns == "policies":
            return tuple(policy.name for policy in self.policies)
        return (ALL,) if self.turns is None else (UNSCRAPED, SCRAPED)

    @property
    def max_tokens(self) -> int:
        """Of an answer."""
        return self.prompts.max_tokens

    @classmethod
    def load(cls, name: str) -> Scenario:
        """Read a scenario of this package by its name, or a file.

        Raises:
            ScenarioError: there is none, or it cannot be used.
        """
        path = SHIPPED / f"{name}.yaml"
        if name not in shipped():
            path = Path(name)
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ScenarioError(
                f"{name}: {error.strerror}; shipped scenarios: {', '.join(shipped())}"
            ) from None
        except yaml.YAMLError as error:
            raise ScenarioError(f"{name}: no YAML: {error}") from None
        return cls.of(given, name)

    @classmethod
    def of(cls, given: Any, name: str) -> Scenario:
        """Check what a file holds.

        Raises:
            ScenarioError: a field is wrong; `name` is what the message begins with.
        """
        try:
            # Lists are tuples in JSON alone; a date or a set is in no scenario.
            return cls.model_validate_json(json.dumps(given))
        except TypeError as error:
            raise ScenarioError(f"{name}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "scenario"
            what = first["msg"].removeprefix("Value error, ")
            raise ScenarioError(f"{name}: {field}: {what}") from None

    def changed(self, **fields: Any) -> Scenario:
        """The scenario with other values of some fields, checked again.

        Raises:
            ScenarioError: they do not fit.
        """
        return self.of(
            {**self.model_dump(mode="json", exclude_unset=True), **fields}, "command line"
        )


def shipped() -> tuple[str, ...]:
    """Names of the scenarios of this package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
