"""A scenario file: what is asked, when, under which policies, and what counts as good.

Every field is checked before anything runs; unknown keys are errors that name the field.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from sluice.loadtest.workload.fields import (
    FULL_DEPTH,
    Arrivals,
    Bars,
    Disconnects,
    Fields,
    Objectives,
    Policy,
    Positive,
    Prompts,
)

SHIPPED = Path(__file__).parents[1] / "scenarios"
ALL = "all"
"""Turn of a scenario without turns, and policy of a row that takes all of them together."""
UNSCRAPED, SCRAPED = "unscraped", "scraped"

Turns = Literal["policies", "scraping"]


class ScenarioError(Exception):
    """A scenario that cannot be played; the message names the file and the field."""


class Scenario(Fields):
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
        if (
            self.disconnects is not None
            and self.disconnects.after_tokens[1] > self.prompts.max_tokens
        ):
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
        return cls.parse(_prompts_file_from(given, path.parent), name)

    @classmethod
    def parse(cls, given: Any, name: str) -> Scenario:
        """Check the content of a file.

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
        return self.parse(
            {**self.model_dump(mode="json", exclude_unset=True), **fields}, "command line"
        )


def _prompts_file_from(given: Any, folder: Path) -> Any:
    """The file's content, with its prompts' file as seen from the working directory."""
    match given:
        case {"prompts": {"file": str(name)} as prompts}:
            return {**given, "prompts": {**prompts, "file": str(folder / name)}}
    return given


def shipped() -> tuple[str, ...]:
    """Names of the scenarios of this package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
