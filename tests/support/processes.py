"""A server of several API processes, and which of them answers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from http.client import HTTPConnection

import psutil
from support.serving import Server

GAUGES = {
    "sluice_layer_utilization_ratio",
    "sluice_experts_active_mean",
    "sluice_expert_load_max_mean_ratio",
}


@dataclass(frozen=True)
class Processes(Server):
    """A server of several API processes.

    Attributes:
        answered: ids of those that have answered a scrape.
    """

    answered: set[int] = field(default_factory=set)

    def metrics_text(self) -> str:
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        connection.request("GET", "/metrics", headers={"cache-control": "no-cache"})
        text = connection.getresponse().read().decode()
        port = connection.sock.getsockname()[1]
        self.answered.update(
            found.pid
            for found in psutil.net_connections("tcp")
            if found.raddr and found.raddr.port == port and found.pid not in (None, os.getpid())
        )
        connection.close()
        return text

    def gauges(self) -> dict[object, float]:
        return {series: value for series, value in self.samples().items() if series[0] in GAUGES}
