"""The line that says where a server answers."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.server.http.startup import announce, ready_line
from sluice.server.telemetry.build_info import sluice_version


def line(presets: int = 9, **changed: Any) -> str:
    args = {"host": "127.0.0.1", "port": 8000, "uds": None, "console": False}
    args |= {"ssl_keyfile": None, "ssl_certfile": None}
    return ready_line(Namespace(**{**args, **changed}), "demo", presets)


@pytest.mark.parametrize(
    ("changed", "address"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"port": 81, "host": "localhost"}, "http://localhost:81"),
        ({"host": None}, "http://0.0.0.0:8000"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"ssl_keyfile": "a", "ssl_certfile": "b"}, "https://127.0.0.1:8000"),
        ({"uds": "/run/a.sock"}, "unix:/run/a.sock"),
    ],
)
def test_the_line_has_the_address(changed: dict[str, Any], address: str) -> None:
    start = f"Sluice {sluice_version()} - demo - {address} - "
    assert line(**changed) == f"{start}9 presets"
    assert line(1, **changed) == f"{start}1 preset"
    console = "/console" if "uds" in changed else f"{address}/console"
    assert line(console=True, **changed) == f"{start}console {console} - 9 presets"


def test_it_is_printed_when_the_server_has_started(capsys: pytest.CaptureFixture[str]) -> None:
    async def start() -> list[str]:
        state = SimpleNamespace()
        task = asyncio.create_task(announce(state, "ready"))
        said = []
        for state.server in (None, SimpleNamespace(started=False), SimpleNamespace(started=True)):
            await asyncio.sleep(0.1)
            said.append(capsys.readouterr().out)
        await task
        return said

    assert asyncio.run(start()) == ["", "", "ready\n"]
