"""The line that says where a server answers."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from sluice.server.http.startup import announce, ready_line, shortened_context
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


@pytest.mark.parametrize(
    ("asked", "fits", "said"),
    [(-1, 900, (900, 1000)), (-1, 1000, None), (800, 800, None), (None, 1000, None)],
)
def test_a_context_that_was_shortened_is_said(
    asked: int | None, fits: int, said: tuple[int, int] | None
) -> None:
    config = SimpleNamespace(
        original_max_model_len=asked, max_model_len=fits, get_and_verify_max_len=lambda _: 1000
    )
    assert shortened_context(config) == said
    if said is not None:
        args = {"host": "127.0.0.1", "port": 8000, "uds": None, "console": False}
        args |= {"ssl_keyfile": None, "ssl_certfile": None}
        assert "context of 900 tokens, not 1000" in ready_line(Namespace(**args), "m", 0, said)


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
