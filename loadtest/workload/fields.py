"""The parts of a scenario file, each checked by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from sluice.models.offline.demo.tasks.tasks import TASKS
from sluice.models.offline.hf_model.examples import CalibrationError, read_examples

FULL_DEPTH = "full depth"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Streams = Annotated[int, Field(ge=1, le=4096)]


class Fields(BaseModel):
    """Base of everything in a scenario file: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Prompts(Fields):
    """What is asked: items of the demo model's tasks, or lines of a file.

    Attributes:
        tasks: weight of each of the demo model's tasks.
        split: of the tasks' items.
        characters: at least so many a prompt: solved items of the same mix come before the
            question. None asks the question alone.
        file: instead, JSON lines as `sluice calibrate` takes them, each with a `prompt`. All are
            asked, in an order drawn by seed, before one is asked again.
        max_tokens: of an answer.
        ignore_eos: every answer has `max_tokens` tokens, so that runs are of equal work.
    """

    tasks: dict[str, Positive] = dict.fromkeys(TASKS, 1.0)
    split: Literal["train", "heldout"] = "heldout"
    characters: Annotated[int, Field(ge=1, le=960)] | None = None
    file: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 48
    ignore_eos: bool = False
    _texts: tuple[str, ...] = PrivateAttr(())

    @property
    def texts(self) -> tuple[str, ...]:
        """Prompts of the file; empty without one."""
        return self._texts

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, float]) -> dict[str, float]:
        unknown = sorted(tasks.keys() - set(TASKS))
        if unknown or not tasks:
            raise ValueError(f"unknown task {unknown[:1]}; known: {', '.join(TASKS)}")
        return tasks

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.file is None:
            return self
        for name in ("tasks", "split", "characters"):
            if name in self.model_fields_set:
                raise ValueError(f"{name} does not go with file")
        try:
            examples = read_examples(Path(self.file))
        except CalibrationError as error:
            raise ValueError(str(error)) from None
        for example in examples:
            if example.prompt is None:
                raise ValueError(f"{example.where}: prompt is missing")
        self._texts = tuple(example.prompt for example in examples if example.prompt is not None)
        return self


class Bursts(Fields):
    """Bursts on top of a rate: every `every` seconds, `factor` times the rate for `seconds`."""

    factor: Annotated[float, Field(gt=1)]
    every: Positive
    seconds: Positive

    @model_validator(mode="after")
    def _shorter(self) -> Self:
        if self.seconds >= self.every:
            raise ValueError("seconds must be less than every: a burst has to end")
        return self


class Saturation(Fields):
    """The rate is measured: what `streams` clients get answered, each asking again at once."""

    streams: Streams
    seconds: Positive


class Arrivals(Fields):
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


class Policy(Fields):
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


class Objectives(Fields):
    """A request is good if it was answered and kept all of these, in milliseconds."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2el_ms: Positive | None = None

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("give at least one of ttft_ms, tpot_ms, e2el_ms")
        return self


class Disconnects(Fields):
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


class Bars(Fields):
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
