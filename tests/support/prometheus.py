"""Debian's Prometheus, asked through its HTTP API."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.serving import free_port

_UNPACKED = Path(__file__).parents[2] / "build/promtool/usr/bin"
_START_LIMIT_SECONDS = 60


def binary(name: str) -> str:
    """`prometheus` or `promtool`: of PATH, or where tests/tools/get-promtool.sh unpacks them."""
    return shutil.which(name) or str(_UNPACKED / name)


def promtool(*arguments: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [binary("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=input, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as response:
            answer = json.loads(response.read())
        assert answer["status"] == "success", answer
        return answer["data"]

    def range(self, expr: str, start: float, end: float) -> list[Any]:
        """Series of an expression, one value a second."""
        found: list[Any] = self.get("query_range", query=expr, start=start, end=end, step=1)[
            "result"
        ]
        return found


@contextmanager
def running_prometheus(config: Path, folder: Path) -> Iterator[Prometheus]:
    port = free_port()
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _await_ready(f"http://127.0.0.1:{port}", process, log)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(timeout=60)


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no Prometheus:\n{log.read_text()[-4000:]}")
