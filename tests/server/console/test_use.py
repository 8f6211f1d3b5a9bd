"""Who can use the console and how: keys, a phone, the keyboard, a screen reader."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from support.console_visit import FULL, POLICY, Visit
from support.serving import Server, running_server

KEY, BASIC_KEY = "sk-the-key-of-alice", "sk-the-key-of-bob"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys, and without expert routing."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = [
        {"id": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "capability": may}
        for name, key, may in (("alice", KEY, "depth"), ("bob", BASIC_KEY, "basic"))
    ]
    (folder / "keys.json").write_text(json.dumps({"keys": keys}))
    flags = [
        "--enforce-eager",
        "--console",
        "--no-expert-routing",
        "--keys",
        str(folder / "keys.json"),
    ]
    with running_server(folder / "log", *flags) as running:
        yield running


@pytest.fixture
def visit(server: Server, visiting: Callable[..., Visit]) -> Callable[..., Visit]:
    """Opens the page and enters a key."""

    def opened(key: str | None = KEY, **context: Any) -> Visit:
        visit = visiting(server.url, **context)
        visit.refusals = True
        visit.open("This server needs a key")
        if key is not None:
            visit.page.get_by_label("API key").fill(key)
            visit.page.get_by_role("button", name="Use key").click()
        return visit

    return opened


def connected(visit: Visit) -> Page:
    expect(visit.page.locator("#connection")).to_have_text("Connected.")
    return visit.page


def unfolded(page: Page) -> None:
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")


def test_without_a_key_the_page_says_so(visit: Callable[..., Visit]) -> None:
    said = visit(None).page.locator("#connection")
    expect(said).to_contain_text("this server needs a key that it knows")


def test_a_key_that_nobody_knows(visit: Callable[..., Visit]) -> None:
    said = visit("another-key").page.locator("#connection")
    expect(said).to_contain_text("The server does not know this key")


def test_a_key_that_cannot_be_one(visit: Callable[..., Visit]) -> None:
    said = visit("ключ").page.locator("#connection")
    expect(said).to_have_text("A key is visible ASCII without spaces.")


def test_the_right_key_opens_the_api_and_stays_in_the_page(visit: Callable[..., Visit]) -> None:
    visited = visit()
    page = connected(visited)
    visited.controls(prompt="sort 7 1 8 2 8", preset="half-depth")
    visited.run()
    assert visited.text(FULL) == visited.text(POLICY) == "1 2 7 8 8"
    visited.column(POLICY).get_by_text("Request", exact=True).click()
    assert not [url for url in visited.urls if KEY in url]
    assert KEY not in page.content()
    stores = "[localStorage, sessionStorage].map(store => store.length)"
    assert page.evaluate(stores) == [0, 0]
    assert page.context.cookies() == []
    page.reload()
    expect(page.locator("#connection")).to_contain_text("This server needs a key")


def test_copied_commands_take_the_key_from_the_environment(visit: Callable[..., Visit]) -> None:
    visited = visit()
    connected(visited)
    visited.controls(prompt="sort 7 1 8 2 8")
    visited.run()
    column = visited.column(POLICY)
    column.get_by_text("Request", exact=True).click()
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    for name, command in (("curl", ["bash", "-c"]), ("python", ["python3", "-c"])):
        snippet = column.locator(f'[data-snippet="{name}"]').inner_text()
        assert KEY not in snippet
        assert "OPENAI_API_KEY" in snippet
        if name == "curl":
            done = subprocess.run(
                [*command, snippet], capture_output=True, timeout=60, env=environment, check=True
            )
            assert '"compute_fraction"' in done.stdout.decode()
            assert "Bearer $OPENAI_API_KEY" in " ".join(shlex.split(snippet))


def test_a_key_that_may_not(visit: Callable[..., Visit]) -> None:
    visited = visit(BASIC_KEY)
    connected(visited)
    visited.controls(preset="", depth="effort")
    visited.run()
    assert [visited.state(FULL), visited.state(POLICY)] == ["done", "failed"]
    problem = visited.column(POLICY).get_by_role("alert")
    expect(problem).to_contain_text("403: routing.effort needs a key of capability 'depth'")
    expect(problem.locator("code")).to_have_text("routing.effort")


def test_a_control_that_the_server_has_not_is_off_and_says_why(visit: Callable[..., Visit]) -> None:
    visited = visit()
    page = connected(visited)
    expect(page.get_by_label("set experts per token")).to_be_disabled()
    expect(page.locator("#top-k-refused")).to_contain_text("expert routing is off on this server")


@pytest.mark.parametrize("width", [375, 320, 768, 1440])
def test_nothing_lies_beside_the_screen(visit: Callable[..., Visit], width: int) -> None:
    visited = visit(viewport={"width": width, "height": 800})
    page = connected(visited)
    beside = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(beside) == 0
    visited.controls(depth="early exit", prompt="reverse " + "a" * 100)
    visited.run()
    unfolded(page)
    expect(page.locator("#expert-table td").first).to_be_visible()
    assert page.evaluate(beside) == 0
    for button in ("Run both", "Stop"):
        box = page.get_by_role("button", name=button).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1280, 720), (1280, 600)])
def test_the_actions_are_always_there_and_cover_no_field(
    visit: Callable[..., Visit], width: int, height: int
) -> None:
    visited = visit(viewport={"width": width, "height": height})
    page = connected(visited)
    visited.controls(preset="", depth="early exit")
    covered = """selector => [...document.querySelectorAll(selector)].filter(field => {
        if (!field.checkVisibility()) return false;
        field.scrollIntoView({block: "nearest"});
        const box = field.getBoundingClientRect();
        const points = [0.1, 0.5, 0.9].map(share =>
            document.elementFromPoint(box.x + box.width / 2, box.y + share * box.height));
        return points.some(point => !(field.contains(point) || point?.contains(field)));
    }).map(field => field.id || field.outerHTML)"""
    assert page.evaluate(covered, "#request :is(input, select, textarea, button)") == []
    for scrolled in (0, 10_000):
        page.evaluate("place => scrollTo(0, place)", scrolled)
        for name in ("Run both", "Stop"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box
            assert 0 <= box["y"] <= height - box["height"]


FOCUS = """() => {
    const element = document.activeElement, style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    return {
        id: element.id || element.textContent.trim(),
        outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
        seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight,
    };
}"""


def test_by_keyboard_alone(visit: Callable[..., Visit]) -> None:
    visited = visit(None)
    page = visited.page
    keys = page.keyboard
    seen: list[str] = []

    def tab_to(wanted: str) -> None:
        for _ in range(30):
            keys.press("Tab")
            focus = page.evaluate(FOCUS)
            assert focus["outline"], focus
            assert focus["seen"], focus
            seen.append(focus["id"])
            if focus["id"] == wanted:
                return
        pytest.fail(f"{wanted} is not reached: {seen}")

    page.locator("body").focus()
    tab_to("key")
    keys.type(KEY)
    keys.press("Enter")
    connected(visited)
    tab_to("prompt")
    keys.press("Control+a")
    keys.type("sort 7 1 8 2 8")
    tab_to("sort")
    tab_to("temperature")
    # The radios of a group are one stop; arrows choose. The choice of no preset is the first.
    keys.press("Tab")
    while visited.routing().get("preset"):
        keys.press("ArrowUp")
    keys.press("Tab")
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    tab_to("exit-method")
    keys.type("fixed")
    keys.press("Tab")
    keys.press("ArrowLeft")
    tab_to("routing")
    exits = {"method": "fixed", "layers": [5]}
    assert visited.routing() == {"depth": {"exit": exits}, "report": True}
    tab_to("Run both")
    keys.press("Enter")
    visited.ended()
    assert visited.text(FULL) == visited.text(POLICY) == "1 2 7 8 8"
    tab_to("stop")
    tab_to("Policy that ran")
    tab_to("Request")
    keys.press("Enter")
    tab_to("Copy as curl")
    keys.press("Enter")
    assert str(page.evaluate("navigator.clipboard.readText()")).startswith("curl ")
    tab_to("Copy as Python")
    for wanted in ("watch", "module", "Layers as a table", "since", "Experts as a table"):
        tab_to(wanted)
    order = ["key", "Use key", "prompt", "system", "max-tokens", "temperature", "exit-method"]
    assert [name for name in seen if name in order] == order


def test_control_enter_runs_and_the_first_stop_leads_to_the_answers(
    visit: Callable[..., Visit],
) -> None:
    visited = visit()
    page = connected(visited)
    page.get_by_label("Message", exact=True).press("Control+Enter")
    visited.ended()
    assert visited.state(FULL) == "done"
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS)["id"] == "Skip to the answers"
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUS)["id"] == "answers"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_axe_finds_nothing(visit: Callable[..., Visit], scheme: str, width: int) -> None:
    visited = visit(None, color_scheme=scheme, viewport={"width": width, "height": 900})
    page = visited.page
    assert faults(page) == []
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    connected(visited)
    visited.controls(preset="", depth="effort")
    assert faults(page) == []
    visited.controls(depth="early exit")
    visited.run()
    unfolded(page)
    expect(page.locator("#expert-table td").first).to_be_visible()
    assert faults(page) == []
    visited.editor.fill('{"effort": 2}')
    visited.run()
    visited.editor.fill("{")
    assert faults(page) == []


def faults(page: Page) -> list[Any]:
    """What axe finds, its best practices included; contrast is among its rules."""
    found = Axe().run(page, options={"resultTypes": ["violations", "passes"]}).response
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]


def test_landmarks_and_names(visit: Callable[..., Visit]) -> None:
    page = connected(visit())
    expect(page.get_by_role("banner")).to_have_count(1)
    expect(page.get_by_role("main")).to_have_count(1)
    for name in ("Prompt", "Policy", "Answers", FULL, "What the server ran", "Layers over time"):
        assert page.get_by_role("region", name=name, exact=True).count() >= 1, name
    expect(page.get_by_role("heading", level=1)).to_have_text("Sluice console")
    expect(page.get_by_role("img", name="Experts by layer")).to_have_count(1)
    expect(page.get_by_role("img", name="Share of token rows that each layer ran")).to_have_count(1)


def test_motion_only_for_those_who_want_it(visit: Callable[..., Visit]) -> None:
    script = """() => {
        const column = document.querySelector(".column");
        column.dataset.state = "running";
        return getComputedStyle(column.querySelector(".state"), "::before").animationName;
    }"""
    moves = {
        wish: connected(visit(reduced_motion=wish)).evaluate(script)
        for wish in ("reduce", "no-preference")
    }
    assert moves == {"reduce": "none", "no-preference": "beat"}
