"""What a server's series and utilization matrix gain."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

from support.mixed_load import Told
from support.serving import Server

from sluice.models.telemetry.ledger import FLUSH_SECONDS

SETTLE_SECONDS = 30


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


class Gains:
    """What a server's series and matrix have gained since."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._samples, self._matrix = server.samples(), self._utilization()
        self.refresh()

    def refresh(self) -> None:
        self._now, self._matrix_now = self._server.samples(), self._utilization()

    def of(self, name: str, **labels: str) -> float:
        """Growth of a series over all engines; every one exists from the start."""
        wanted, grown = key(name, **labels), []
        for series, value in self._samples.items():
            name, given = series
            own = frozenset(label for label in given if label[0] != "engine")
            if (name, own) == wanted:
                grown.append(self._now[series] - value)
        assert grown, wanted
        return sum(grown)

    def before(self, name: str, **labels: str) -> float:
        """A series' value at the beginning."""
        return self._samples[key(name, **labels)]

    def of_all(self, name: str) -> float:
        """Growth of all series of a name."""
        return sum(self._now[s] - self._samples[s] for s in self._samples if s[0] == name)

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """Growth of a name's series by these labels, where there is any."""
        found: Counter[tuple[str, ...]] = Counter()
        for series, value in self._samples.items():
            if series[0] == name:
                given = dict(series[1])
                found[tuple(given[label] for label in labels)] += int(self._now[series] - value)
        return +found

    def of_matrix(self, read: Callable[[dict[str, Any]], int]) -> int:
        """Growth of a number of `/v1/routing/utilization`."""
        return read(self._matrix_now) - read(self._matrix)

    @property
    def matrix(self) -> dict[str, Any]:
        """The latest answer of `/v1/routing/utilization`."""
        return self._matrix_now

    def _utilization(self) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.url}/v1/routing/utilization",
            headers={"Authorization": f"Bearer {self._server.api_key}"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            body: dict[str, Any] = json.loads(response.read())
        return body


def settled(gains: Gains, told: Told) -> None:
    """Read again until all that ended has been counted, and nothing more comes.

    A compute fraction is observed after the answer has been sent, and an engine tells what it has
    selected a little after it has nothing left to run.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    ok = sum(count for (_, outcome), count in told.outcomes.items() if outcome == "ok")
    generated = told.completion_tokens - told.samples
    before = None
    gains.refresh()
    while time.monotonic() < deadline and (
        gains.of("sluice_request_compute_fraction_count") < ok
        or gains.of_all("sluice_exit_tokens_total") < generated
        or gains.matrix != before
    ):
        before = gains.matrix
        time.sleep(2 * FLUSH_SECONDS)
        gains.refresh()
