"""The console against the demo model: what it shows is what the API says."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect
from support.console_visit import CHAT, ENDLESS, FULL, POLICY, SKIPS, Visit, fixed
from support.relay import relayed
from support.serving import Server

LOOKS = 30_000
"""Milliseconds in which the page has looked for the server, on a busy machine too."""


def answer(server: Server, body: dict[str, Any]) -> tuple[str, Any]:
    """Text and report of the same request, asked of the API without a stream."""
    whole = {name: value for name, value in body.items() if not name.startswith("stream")}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(whole).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found = json.load(response)
    return found["choices"][0]["message"]["content"], found.get("routing")


def test_the_page_names_the_server_and_its_policies(visit: Visit, console_server: Server) -> None:
    expect(visit.page.locator("#facts")).to_have_text(
        "demo: 8 layers, 16 experts a layer, 4 per token"
    )
    with urllib.request.urlopen(f"{console_server.url}/v1/routing/presets", timeout=30) as response:
        presets = [preset["id"] for preset in json.load(response)["data"]]
    names = visit.page.locator("#presets .name").all_text_contents()
    assert sorted(name for row in names for name in row.split(", ")) == sorted(["none", *presets])
    assert visit.routing() == {"preset": presets[0], "report": True}
    assert {*visit.urls} >= {
        f"{console_server.url}/console",
        f"{console_server.url}/v1/routing/capabilities",
    }


@pytest.mark.parametrize("preset", ["half-depth", "early-exit", "prompt-chosen"])
def test_both_columns_show_what_the_api_answers(
    visit: Visit, console_server: Server, preset: str
) -> None:
    visit.controls(prompt="sort 7 1 8 2 8", preset=preset)
    full, chosen = visit.run()
    assert full["routing"] == {"report": True}
    assert chosen["routing"] == {"preset": preset, "report": True}
    for title, body in ((FULL, full), (POLICY, chosen)):
        text, report = answer(console_server, body)
        assert visit.state(title) == "done"
        assert visit.text(title) == text == "1 2 7 8 8"
        generated = report["generated"]
        assert visit.meter(title, "layers") == f"{fixed(generated['mean_layers'], 2)} of 8"
        assert (
            visit.meter(title, "generated") == f"{fixed(100 * generated['compute_fraction'], 1)} %"
        )
        assert visit.meter(title, "compute") == f"{fixed(100 * report['compute_fraction'], 1)} %"
        assert visit.meter(title, "tokens") == str(generated["tokens"] + 1)
        assert float(visit.meter(title, "first").removesuffix(" ms")) > 0
        visit.column(title).get_by_text("Policy that ran").click()
        assert json.loads(visit.column(title).locator(".ran pre").inner_text()) == report["policy"]
        shares = visit.column(title).locator("canvas.layers").get_attribute("aria-label") or ""
        assert re.findall(r"layer \d+ (\d+) %", shares) == [
            fixed(100 * ((layer["attention"]["executed"] + layer["mlp"]["executed"]) / rows), 0)
            for layer in report["layers"]
            if (rows := sum([*layer["attention"].values(), *layer["mlp"].values()]))
        ]
    assert visit.meter(FULL, "layers") == "8.00 of 8"
    assert visit.meter(FULL, "compute") == "100.0 %"
    assert visit.meter(POLICY, "generated") != "100.0 %"


def test_a_message_goes_with_what_the_form_says(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("System message").fill("be short")
    page.get_by_label("Max tokens").fill("3")
    page.get_by_label("Temperature").fill("")
    visit.controls(prompt="reverse abcdefg")
    for body in visit.run():
        assert body.pop("routing")["report"]
        assert body == {
            "model": "demo",
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "reverse abcdefg"},
            ],
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    assert visit.meter(FULL, "tokens") == "3"
    expect(visit.column(FULL).locator(".state")).to_have_text("done, cut off at max tokens")
    expect(visit.column(FULL).get_by_role("status")).to_contain_text("Full depth: done, cut off")


def test_the_policys_text_is_what_is_sent(visit: Visit, console_server: Server) -> None:
    visit.controls(prompt="sort 7 1 8 2 8")
    visit.editor.fill("{")
    expect(visit.page.locator("#routing-error")).to_contain_text("Not JSON")
    expect(visit.editor).to_have_attribute("aria-invalid", "true")
    visit.page.get_by_role("button", name="Run both").click()
    expect(visit.editor).to_be_focused()
    assert visit.bodies == []
    visit.editor.fill(json.dumps(SKIPS))
    expect(visit.page.locator("#routing-error")).to_have_text("")
    expect(visit.page.locator("#routing-note")).to_contain_text("Edited by hand")
    _, chosen = visit.run()
    assert chosen["routing"] == SKIPS
    assert visit.text(POLICY) == answer(console_server, chosen)[0]
    assert visit.meter(POLICY, "layers") == "4.00 of 8"
    visit.editor.fill("")
    _, chosen = visit.run()
    assert "routing" not in chosen
    assert visit.meter(POLICY, "layers") == "\u2013"
    visit.controls(preset="half-depth")
    assert visit.routing() == {"preset": "half-depth", "report": True}


def test_a_refusal_says_why_and_where(visit: Visit) -> None:
    visit.refusals = True
    visit.editor.fill('{"depth": {"skip": {"blocks": [8]}}}')
    visit.run()
    assert [visit.state(FULL), visit.state(POLICY)] == ["done", "failed"]
    problem = visit.column(POLICY).get_by_role("alert")
    expect(problem).to_contain_text("400: layer 8 does not exist: the model has layers 0 to 7")
    expect(problem.locator("code")).to_have_text("routing.depth.skip.blocks.0")
    visit.controls(preset="half-depth")
    visit.run()
    assert visit.state(POLICY) == "done"
    expect(problem).to_be_hidden()


def test_meters_move_while_it_streams_and_stop_ends_it(
    visit: Visit, console_server: Server
) -> None:
    visit.endless()
    visit.at_once()
    aborted = ("sluice_requests_total", frozenset({("preset", "custom"), ("outcome", "aborted")}))
    before = console_server.samples()[aborted]
    visit.editor.fill(json.dumps(SKIPS))
    visit.page.get_by_role("button", name="Run both").click()
    visit.running(tokens=5)
    first = visit.meter(FULL, "first")
    visit.running(tokens=50)
    visit.page.get_by_role("button", name="Stop").click()
    visit.ended()
    assert [visit.state(FULL), visit.state(POLICY)] == ["stopped", "stopped"]
    assert visit.meter(FULL, "first") == first
    assert all(float(visit.meter(title, "rate")) > 0 for title in (FULL, POLICY))
    shown = [visit.text(FULL), visit.meter(FULL, "tokens")]
    assert shown[0]
    assert 50 <= int(shown[1]) < ENDLESS
    deadline = time.monotonic() + 60
    while console_server.samples()[aborted] < before + 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert console_server.samples()[aborted] == before + 2
    assert [visit.text(FULL), visit.meter(FULL, "tokens")] == shown
    expect(visit.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")


def test_one_after_the_other(visit: Visit) -> None:
    page = visit.page
    expect(page.get_by_label("one after the other")).to_be_checked()
    visit.endless()
    page.get_by_role("button", name="Run both").click()
    assert visit.running(1, FULL) == ["running", "waiting"]
    page.get_by_role("button", name="Stop").click()
    visit.ended()
    assert [visit.state(FULL), visit.state(POLICY)] == ["stopped", "stopped"]
    assert len(visit.bodies) == 1
    page.get_by_label("Max tokens").fill("60")
    visit.run()
    assert [visit.state(FULL), visit.state(POLICY)] == ["done", "done"]
    assert visit.meter(POLICY, "tokens") == "60"


def test_a_new_run_takes_the_place_of_one_that_runs(visit: Visit) -> None:
    visit.endless()
    visit.at_once()
    visit.page.get_by_role("button", name="Run both").click()
    visit.running(tokens=3)
    visit.page.unroute(CHAT)
    visit.controls(prompt="reverse abc")
    visit.run()
    assert [visit.text(FULL), visit.state(FULL)] == ["cba", "done"]
    expect(visit.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")


def test_a_server_that_goes_away(console_server: Server, visiting: Callable[..., Visit]) -> None:
    with relayed(console_server.url) as relay:
        visit = visiting(relay.origin)
        visit.refusals = True
        visit.open()
        visit.endless()
        visit.at_once()
        visit.page.get_by_role("button", name="Run both").click()
        visit.running(tokens=3)
        relay.cut()
        visit.ended()
        for title in (FULL, POLICY):
            assert visit.state(title) == "failed"
            problem = visit.column(title).get_by_role("alert")
            expect(problem).to_contain_text("The connection broke before the answer was complete")
            assert int(visit.meter(title, "tokens")) >= 3
        page, gone = visit.page, visit.page.locator("#gone")
        expect(page.locator("#connection")).to_contain_text("No look at what runs")
        expect(gone).to_contain_text("No server since", timeout=LOOKS)
        expect(gone).to_contain_text("The server cannot be reached")
        expect(page.locator("#connection")).to_be_hidden()
        run = page.get_by_role("button", name="Run both")
        controls = (run, visit.preset("shallow"), page.get_by_role("radio", name="early exit"))
        for control in controls:
            expect(control).to_be_disabled()
        page.get_by_label("Message", exact=True).fill("sort 3 1 2 8")
        relay.restore()
        expect(gone).to_be_empty(timeout=LOOKS)
        for control in controls:
            expect(control).to_be_enabled()
        expect(page.locator("#connection")).to_have_text("Connected.")
        page.unroute(CHAT)
        visit.run()
        assert visit.text(FULL) == "1 2 3 8"


def test_an_engine_that_ends_is_noticed(visit: Visit) -> None:
    """What such a server says, by hand: the other tests need the engine."""
    visit.refusals = True
    health, gone = "**/health", visit.page.locator("#gone")
    visit.page.route(health, lambda route: route.fulfill(status=503))
    expect(gone).to_contain_text("its engine is not (503)", timeout=LOOKS)
    expect(visit.page.get_by_role("button", name="Run both")).to_be_disabled()
    visit.page.unroute(health)
    expect(gone).to_be_empty(timeout=LOOKS)
    expect(visit.page.get_by_role("button", name="Run both")).to_be_enabled()


def test_events_are_cut_right_wherever_the_network_cuts(visit: Visit) -> None:
    stream = (
        'data: {"a": "é日"}\n\n: a comment\n\n'
        "data: one\r\ndata:two\r\n\r\ndata: [DONE]\n\ndata: cut"
    )
    script = """async ([text, size]) => {
        const {events} = await import("/console/events.js");
        const bytes = new TextEncoder().encode(text);
        const body = new ReadableStream({start(controller) {
            for (let n = 0; n < bytes.length; n += size)
                controller.enqueue(bytes.slice(n, n + size));
            controller.close();
        }});
        const found = [];
        for await (const data of events(body)) found.push(data);
        return found;
    }"""
    for size in (1, 2, 7, 1000):
        found = visit.page.evaluate(script, [stream, size])
        assert found == ['{"a": "é日"}', "one\ntwo", "[DONE]"], size


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "The server ended the answer before it was complete."),
        ('data: {"error": {"message": "the engine died", "code": 500}}\n\n', "the engine died"),
        ('data: {"error": "the engine died"}\n\ndata: [DONE]\n\n', "the engine died"),
    ],
)
def test_a_stream_that_is_not_whole(visit: Visit, rest: str, problem: str) -> None:
    """Written by hand: no server of ours ends one like that when asked to."""
    chunks = [
        {"choices": [{"delta": {"content": text}}], "usage": {"completion_tokens": tokens}}
        for text, tokens in (("1", 1), (" 2", 3))
    ]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + rest
    visit.page.route(CHAT, lambda route: route.fulfill(body=stream))
    visit.run()
    for title in (FULL, POLICY):
        assert (visit.state(title), visit.text(title)) == ("failed", "1 2")
        # Chunks that come in one piece have no speed.
        assert (visit.meter(title, "tokens"), visit.meter(title, "rate")) == ("3", "\u2013")
        expect(visit.column(title).get_by_role("alert")).to_contain_text(problem)
