"""A server in a process of its own, started the way a user starts it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

START_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    api_key: str = "EMPTY"
    pid: int = 0

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0)

    def post(self, path: str, raw: bytes, api_key: str | None = None) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON body."""
        headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {api_key or self.api_key}",
        }
        request = urllib.request.Request(f"{self.url}{path}", raw, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics_text(self) -> str:
        headers = {"authorization": f"Bearer {self.api_key}", "cache-control": "no-cache"}
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
        }


def free_port() -> int:
    """A port below those that clients are given: it is still free when a server has started."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running_server(log: Path, *arguments: str, api_key: str | None = None) -> Iterator[Server]:
    """`sluice serve ARGUMENTS` on a free loopback port, ended with SIGINT as by Ctrl-C."""
    port = free_port()
    if api_key is not None:
        arguments = (*arguments, "--api-key", api_key)
    # What conftest.py sets for engines inside the test process is not for servers.
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [str(Path(sys.executable).parent / "sluice"), "serve", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log, api_key or "EMPTY", process.pid)
            _await_health(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _await_health(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server after {START_LIMIT_SECONDS} s:\n{server.log.read_text()[-4000:]}")
