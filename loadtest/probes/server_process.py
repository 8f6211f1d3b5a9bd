"""A server that runs as long as the load test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_START_SECONDS = 600
_STOP_SECONDS = 60


class NotStartedError(Exception):
    """The server ended, or did not answer in time."""


@dataclass(frozen=True)
class Program:
    """A server's command.

    Attributes:
        main: module whose `main` reads `serve` and its arguments from the command line.
        environment: variables that it gets beside this process's.
    """

    main: str
    environment: Mapping[str, str] = field(default_factory=dict)


SLUICE = Program("sluice.server.cli.main")
STOCK_VLLM = Program("sluice.loadtest.probes.stock_vllm", {"VLLM_PLUGINS": ""})
"""VLLM as without Sluice: an empty list loads no plugin."""


@contextmanager
def server_process(arguments: Sequence[str], log: Path, program: Program = SLUICE) -> Iterator[str]:
    """`sluice serve ARGUMENTS` on a free loopback port: its URL. Ended as by Ctrl-C.

    Args:
        arguments: of `serve`.
        log: file for what the server prints.
        program: whose `serve`.

    Raises:
        NotStartedError: the server ended, or did not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", f"from {program.main} import main; main()", "serve"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **program.environment},
            # Ctrl-C on the load test must not end the server before the clients.
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise NotStartedError(f"no server at {url}; what it said is in {log}")
