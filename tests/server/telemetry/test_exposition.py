"""Who asks for `/metrics` at a fixed pace finds the text made; nobody else does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.server.telemetry import exposition as module
from sluice.server.telemetry.exposition import AHEAD_SECONDS, MOST_SECONDS, Exposition

PACE = 15.0


class Visits(Collector):
    """A gauge that shows how often it was collected."""

    def __init__(self) -> None:
        self.collected = 0
        self.threads: set[int] = set()

    def collect(self) -> Iterator[Metric]:
        self.collected += 1
        self.threads.add(threading.get_ident())
        yield GaugeMetricFamily("collected", "Times.", value=self.collected)


class Scene:
    """An exposition, its clock, and what it has collected."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.visits = Visits()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.visits)
        self.visits.collected = 0
        self.exposition = Exposition(registry)
        # Not the clock of the event loop.
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def text(self, *, fresh: bool = False) -> str:
        text = await self.exposition.text(fresh=fresh)
        return text.decode().splitlines()[-1]

    async def until_collected(self, times: int) -> None:
        while self.visits.collected < times:
            await asyncio.sleep(0.001)


def play(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Scene], Awaitable[None]]) -> Scene:
    scene = Scene(monkeypatch)

    async def main() -> None:
        await scenario(scene)

    asyncio.run(main())
    return scene


def test_the_text_of_a_visit_at_the_same_pace_is_made_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In this test's time, the next visit is due at once.
    monkeypatch.setattr(module, "AHEAD_SECONDS", PACE - 0.001)

    async def scenario(scene: Scene) -> None:
        assert await scene.text() == "collected 1.0"
        scene.now += PACE
        assert await scene.text() == "collected 2.0"
        await scene.until_collected(3)
        await scene.exposition._making
        scene.now += AHEAD_SECONDS
        assert await scene.text() == "collected 3.0"
        assert scene.visits.collected == 3, "from memory"
        assert await scene.text(fresh=True) == "collected 4.0"

    scene = play(monkeypatch, scenario)
    assert threading.get_ident() not in scene.visits.threads, "the event loop makes no text"


def test_old_text_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        assert await scene.text() == "collected 1.0"
        scene.now += MOST_SECONDS + 0.01
        assert await scene.text() == "collected 2.0"

    play(monkeypatch, scenario)


def test_who_comes_once_or_very_often_has_nothing_made_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.text()
        assert scene.exposition._next is None
        scene.now += AHEAD_SECONDS / 2
        await scene.text()
        assert scene.exposition._next is None
        scene.now += PACE
        await scene.text()
        assert scene.exposition._next is not None
        await scene.text(fresh=True)
        assert scene.exposition._next is not None

    play(monkeypatch, scenario)
