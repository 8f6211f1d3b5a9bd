"""One visit of the console: what the page shows, and what it did that nobody sees."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Locator, Page, Request, Route, expect

FULL, POLICY = "Full depth", "Under the policy"
CHAT = "**/v1/chat/completions"
SKIPS = {"depth": {"skip": {"blocks": [4, 5, 6, 7]}}, "report": True}
ENDLESS = 15_000
"""Tokens of an answer that is still running whenever a test looks: minutes of them."""
ENDED = re.compile("done|stopped|failed")


@dataclass
class Visit:
    """A page of the console.

    Attributes:
        page: not opened yet.
        origin: of the server.
        refusals: whether the server may refuse something: the browser's own log says so too.
        bodies: of the chat completions that were sent.
    """

    page: Page
    origin: str
    refusals: bool = False
    urls: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    thrown: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(20_000)
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.thrown.append(str(error)))

    def open(self, connection: str = "Connected.") -> Page:
        self.page.goto(f"{self.origin}/console")
        expect(self.page.locator("#connection")).to_contain_text(connection)
        self.rounds(1)
        return self.page

    def rounds(self, count: int) -> None:
        """Have each request sent so many times, in turn."""
        self.page.locator("#rounds").select_option(str(count))

    def at_once(self) -> None:
        """Have both requests run at the same time."""
        self.page.get_by_label("both at once").check()

    def column(self, title: str) -> Locator:
        return self.page.get_by_role("region", name=title, exact=True).and_(
            self.page.locator(".column")
        )

    def state(self, title: str) -> str | None:
        return self.column(title).get_attribute("data-state")

    def meter(self, title: str, name: str) -> str:
        return self.column(title).locator(f'[data-meter="{name}"]').inner_text()

    def text(self, title: str) -> str:
        return self.column(title).locator(".text").text_content() or ""

    def run(self) -> list[dict[str, Any]]:
        """Run both to their ends; the bodies that were sent first, full depth first."""
        sent = len(self.bodies)
        rounds = self.page.locator("#rounds")
        count = int(rounds.input_value()) if rounds.is_enabled() else 1
        self.page.get_by_role("button", name="Run both").click()
        self.ended()
        assert len(self.bodies) == sent + 2 * count
        return self.bodies[sent : sent + 2]

    def ended(self) -> None:
        """Wait until both columns have ended."""
        for column in self.page.locator(".column").all():
            expect(column).to_have_attribute("data-state", ENDED, timeout=120_000)

    def running(self, tokens: int, *titles: str) -> list[str]:
        """Wait until these columns (both, unless told) run and have so many tokens.

        Returns:
            States of both columns at that moment.
        """
        # In the page, since an answer may be over before several questions to it are; and not by
        # wait_for_function, which evaluates text there: the page's policy forbids that.
        script = """([least, titles]) => new Promise((resolve, reject) => {
            const columns = [...document.querySelectorAll(".column")];
            const meant = columns.filter(column =>
                titles.includes(column.querySelector("h3").textContent));
            const tokens = column => Number(
                column.querySelector('[data-meter="tokens"]').textContent) || 0;
            const deadline = performance.now() + 120_000;
            const look = () => {
                const states = columns.map(column => column.dataset.state);
                if (meant.some(column => !["waiting", "running"].includes(column.dataset.state)))
                    reject(new Error(`it has ended: ${states}`));
                else if (meant.every(column => tokens(column) >= least)) resolve(states);
                else if (performance.now() > deadline) reject(new Error(`still ${states}`));
                else setTimeout(look, 10);
            };
            look();
        })"""
        return list(self.page.evaluate(script, [tokens, [*titles] or [FULL, POLICY]]))

    def endless(self, tokens: int = ENDLESS) -> None:
        """From now on the model may not stop by itself: answers have so many tokens."""
        self.page.get_by_label("Max tokens").fill(str(tokens))

        def longer(route: Route) -> None:
            body = {**json.loads(route.request.post_data or ""), "ignore_eos": True}
            route.continue_(post_data=json.dumps(body))

        self.page.route(CHAT, longer)

    def controls(self, *, prompt: str = "", preset: str | None = None, depth: str = "") -> None:
        """Set the form up."""
        if prompt:
            self.page.get_by_label("Message", exact=True).fill(prompt)
        if preset is not None:
            self.preset(preset).check()
        if depth:
            self.page.get_by_role("radio", name=depth, exact=True).check()

    def preset(self, name: str) -> Locator:
        """The choice of a preset; that of none for an empty name."""
        return self.page.locator(f'#presets input[value="{name}"]')

    def routing(self) -> Any:
        return json.loads(self.editor.input_value())

    @property
    def editor(self) -> Locator:
        return self.page.locator("#routing")

    def check(self) -> None:
        """Nothing was thrown, logged or asked of anybody else."""
        assert self.thrown == []
        # The browser logs each answer that is an error, which is no fault of the page.
        faults = [line for line in self.logged if "Failed to load resource" not in line]
        assert faults == []
        assert self.refusals or self.logged == []
        assert {origin_of(url) for url in self.urls} == {self.origin}

    def _requested(self, request: Request) -> None:
        self.urls.append(request.url)
        if request.url.endswith("/chat/completions"):
            self.bodies.append(json.loads(request.post_data or ""))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.logged.append(message.text)


def fixed(value: float, places: int) -> str:
    """A number as JavaScript's `toFixed` writes it, which rounds a half away from zero."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
