"""Requests copied from the console do elsewhere what they did there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from playwright.sync_api import expect
from support.console_visit import FULL, POLICY, Visit

HARD = """sort 5 2 9 1 4 'it''s' "$HOME" `id` \\ \\n !! %s
# and é, 日本, {"a": [true, null]}"""


def copied(visit: Visit, title: str, button: str) -> str:
    visit.column(title).get_by_role("button", name=button).click()
    expect(visit.column(title).get_by_role("status")).to_contain_text("Copied as")
    return str(visit.page.evaluate("navigator.clipboard.readText()"))


def run(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, check=True)
    return done.stdout.decode()


@pytest.mark.parametrize("title", [FULL, POLICY])
@pytest.mark.parametrize("prompt", ["sort 7 1 8 2 8", HARD])
def test_copied_requests_give_the_same_answer(visit: Visit, title: str, prompt: str) -> None:
    policy = {
        "depth": {"exit": {"method": "fixed", "layers": [5]}, "phase": "both"},
        "report": True,
    }
    visit.editor.fill(json.dumps(policy))
    visit.controls(prompt=prompt)
    bodies = dict(zip((FULL, POLICY), visit.run(), strict=True))
    column = visit.column(title)
    column.get_by_text("Request", exact=True).click()
    as_curl, as_python = (copied(visit, title, f"Copy as {name}") for name in ("curl", "Python"))
    assert json.loads(shlex.split(as_curl)[-1]) == bodies[title]
    events = run(["bash", "-c", as_curl]).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == visit.text(title)
    printed = run([sys.executable, "-c", as_python])
    assert printed == f"{visit.text(title)}\n{chunks[-1]['routing']}\n"
    fraction = chunks[-1]["routing"]["compute_fraction"]
    # Six of eight layers, and the LM head.
    assert fraction == 1.0 if title == FULL else 0.75 < fraction < 0.8


def test_before_a_run_the_request_is_the_one_to_come(visit: Visit) -> None:
    visit.controls(prompt="reverse abc", preset="shallow")
    visit.column(POLICY).get_by_text("Request", exact=True).click()
    snippet = visit.column(POLICY).locator('[data-snippet="curl"]')
    coming = json.loads(shlex.split(snippet.inner_text())[-1])
    _, sent = visit.run()
    assert coming == sent
    visit.controls(prompt="reverse xyz")
    assert json.loads(shlex.split(snippet.inner_text())[-1]) == sent
    _, next_sent = visit.run()
    assert json.loads(shlex.split(snippet.inner_text())[-1]) == next_sent != sent


def test_where_there_is_no_clipboard_the_text_is_selected(visit: Visit) -> None:
    visit.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    column = visit.column(FULL)
    column.get_by_text("Request", exact=True).click()
    column.get_by_role("button", name="Copy as curl").click()
    expect(column.locator(".sent .note")).to_have_text("Selected: press Ctrl+C to copy.")
    selected = str(visit.page.evaluate("getSelection().toString()"))
    assert selected.strip() == column.locator('[data-snippet="curl"]').inner_text().strip()
