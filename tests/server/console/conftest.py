"""Chromium for the tests of the console."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from support.console_visit import ENDLESS, Visit
from support.serving import Server, running_server

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def console_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model as `sluice serve --console` serves it, but with room for long answers.

    What a test does while an answer runs must not find it at its end, however slow the page is: a
    model that may say 1,000 tokens has said them in five seconds.
    """
    log = tmp_path_factory.mktemp("console") / "log"
    longer = ("--hf-overrides", json.dumps({"max_position_embeddings": 2 * ENDLESS}))
    with running_server(log, "--enforce-eager", "--console", *longer) as running:
        yield running


# Not for the session: while playwright runs, no other test could use asyncio.run.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "tests/tools/get-chromium.sh puts Chromium on PATH"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])
        yield launched
        launched.close()


@pytest.fixture
def visiting(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens pages; at the end of the test, what happened in them must have been in order."""
    visits: list[Visit] = []

    def visit(origin: str, **context: Any) -> Visit:
        opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        opened.grant_permissions(["clipboard-read", "clipboard-write"], origin=origin)
        visits.append(Visit(opened.new_page(), origin))
        return visits[-1]

    yield visit
    for each in visits:
        each.page.context.close()
        each.check()


@pytest.fixture
def visit(console_server: Server, visiting: Callable[..., Visit]) -> Visit:
    """The console, opened."""
    visit = visiting(console_server.url)
    visit.open()
    return visit
