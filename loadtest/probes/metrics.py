"""`/metrics` of the server: what a run changed, what still runs, and how long a scrape takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_COUNTED = ("counter", "histogram", "summary")
_SETTLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Series:
    """Name and labels of a series."""

    name: str
    labels: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        inner = ",".join(f'{name}="{value}"' for name, value in self.labels)
        return f"{self.name}{{{inner}}}" if inner else self.name


@dataclass(frozen=True, slots=True)
class Change:
    """A series before and after; one that was not there before is 0 then."""

    series: Series
    before: float
    after: float

    @property
    def delta(self) -> float:
        """How much it grew."""
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Scrape:
    """What `/metrics` showed at one moment.

    Attributes:
        values: of all series.
        counted: those of them that only grow.
    """

    values: Mapping[Series, float]
    counted: frozenset[Series]

    def total(self, name: str) -> float:
        """Sum over the series of a name; 0 if there is none."""
        return sum(value for series, value in self.values.items() if series.name == name)


async def scrape(client: httpx.AsyncClient) -> Scrape:
    """Ask `/metrics` of the client's base URL.

    Raises:
        httpx.HTTPError: there is no answer, or an error.
    """
    # Not what was made ahead for somebody who asks at a fixed pace.
    return parse(await _text(client, {"cache-control": "no-cache"}))


async def _text(client: httpx.AsyncClient, headers: Mapping[str, str] | None = None) -> str:
    response = await client.get("/metrics", headers=headers)
    response.raise_for_status()
    return response.text


def parse(text: str) -> Scrape:
    """Read the text format."""
    values: dict[Series, float] = {}
    counted: set[Series] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = Series(sample.name, tuple(sorted(sample.labels.items())))
            values[series] = sample.value
            if family.type in _COUNTED and not sample.name.endswith("_created"):
                counted.add(series)
    return Scrape(values, frozenset(counted))


def changes(before: Scrape, after: Scrape) -> tuple[Change, ...]:
    """Series that only grow and did; buckets of histograms are left out."""
    counted = (
        Change(series, before.values.get(series, 0.0), after.values[series])
        for series in after.counted
        if not series.name.endswith("_bucket")
    )
    grown = [change for change in counted if change.delta]
    return tuple(sorted(grown, key=lambda change: str(change.series)))


async def wait_until_idle(client: httpx.AsyncClient) -> tuple[dict[str, float], float]:
    """Wait until no request is running or waiting, half a minute at most.

    Returns:
        Running and waiting requests by the name of their series, and the seconds waited.
    """
    started = time.perf_counter()
    while True:
        metrics = await scrape(client)
        left = {name: metrics.total(name) for name in (RUNNING, WAITING)}
        waited = time.perf_counter() - started
        if not any(left.values()) or waited > _SETTLE_SECONDS:
            return left, waited
        await asyncio.sleep(0.25)


async def scrape_every(client: httpx.AsyncClient, seconds: float, taken: list[float]) -> None:
    """Scrape at a fixed pace until cancelled; `taken` gets the seconds that each one took.

    Raises:
        httpx.HTTPError: a scrape failed.
    """
    due = time.perf_counter()
    while True:
        # What is read is not parsed here: that would be the client's time, not the server's.
        started = time.perf_counter()
        await _text(client)
        taken.append(time.perf_counter() - started)
        due += seconds
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
