"""The console's controls: what they write, and where their ranges come from."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Route, expect
from support.console_visit import FULL, POLICY, Visit, fixed
from support.serving import Server

from sluice.server.console import page


def capabilities(server: Server) -> Any:
    with urllib.request.urlopen(f"{server.url}/v1/routing/capabilities", timeout=30) as response:
        return json.load(response)


def own_threshold(visit: Visit) -> None:
    """Leave the profile's calibrated threshold, if it has one."""
    calibrated = visit.page.get_by_label("calibrated threshold")
    if calibrated.is_visible():
        calibrated.uncheck()


def test_controls_write_the_policy(visit: Visit, console_server: Server) -> None:
    page = visit.page
    lowest = capabilities(console_server)["effort"]["lowest"]
    visit.controls(preset="", depth="effort")
    effort = page.get_by_label("Effort", exact=True)
    assert visit.routing() == {"effort": 1, "report": True}
    effort.press("Home")
    assert visit.routing() == {"effort": lowest, "report": True}
    expect(effort).to_have_attribute("aria-valuetext", f"{lowest:.4g}")
    visit.controls(depth="early exit")
    page.get_by_label("Exit method").select_option("confidence")
    own_threshold(visit)
    page.get_by_label("threshold", exact=True).press("End")
    page.get_by_label("first layer to leave after").press("ArrowRight")
    exits = {"method": "confidence", "threshold": 1, "min_layer": 1}
    assert visit.routing() == {"depth": {"exit": exits}, "report": True}
    page.get_by_label("Exit method").select_option("q_exit")
    own_threshold(visit)
    default = capabilities(console_server)["depth"]["exit"]["q_exit"]["parameters"]["threshold"]
    assert visit.routing()["depth"] == {
        "exit": {"method": "q_exit", "threshold": default["default"]}
    }
    page.get_by_label("Exit method").select_option("fixed")
    page.get_by_label("leave after layer").press("ArrowLeft")
    assert visit.routing()["depth"] == {"exit": {"method": "fixed", "layers": [5]}}
    page.get_by_label("Exit method").select_option("patience")
    own_threshold(visit)
    page.get_by_label("patience", exact=True).press("End")
    assert visit.routing()["depth"] == {"exit": {"method": "patience", "patience": 7}}
    page.get_by_label("set experts per token").check()
    top_k = page.get_by_label("Experts per token", exact=True)
    assert visit.routing()["experts"] == {"top_k": 4}
    top_k.press("ArrowLeft")
    assert visit.routing()["experts"] == {"top_k": 3}
    top_k.press("End")
    assert visit.routing()["experts"] == {"top_k": 16}
    visit.run()
    assert visit.state(POLICY) == "done"


def test_the_controls_are_the_servers(
    console_server: Server, visiting: Callable[..., Visit]
) -> None:
    """Another server's answer, made from this one's."""
    visit = visiting(console_server.url)
    page = visit.page

    def other(route: Route) -> None:
        answer = route.fetch()
        found = answer.json()
        exits = found["depth"]["exit"]
        exits["entropy"] |= {"available": False, "reason": "nothing was trained"}
        bound = {"tolerance": 0.05, "error": 0.05, "agreement": 0.99, "mean_layers": 3.5}
        calibrated = {"layers": [2, 4], "threshold": 0.8371, **bound}
        exits["confidence"]["calibrated"] = [calibrated]
        exits["confidence"]["parameters"]["threshold"] = {
            "low": 0.25,
            "high": 0.9,
            "default": 0.8371,
        }
        found["effort"] |= {"lowest": 0.4375, "source": "frontier"}
        route.fulfill(response=answer, json=found)

    page.route("**/v1/routing/capabilities", other)
    visit.open()
    visit.controls(preset="", depth="effort")
    page.get_by_label("Effort", exact=True).press("Home")
    assert visit.routing() == {"effort": 0.4375, "report": True}
    expect(page.locator("#effort-note")).to_contain_text("measured frontier. Lowest: 0.4375.")
    visit.controls(depth="early exit")
    method = page.get_by_label("Exit method")
    entropy = method.locator('option[value="entropy"]')
    expect(entropy).to_be_disabled()
    expect(entropy).to_have_text("entropy: not here: nothing was trained")
    method.select_option("confidence")
    threshold = page.get_by_label("threshold", exact=True)
    expect(threshold).to_be_disabled()
    assert visit.routing()["depth"] == {"exit": {"method": "confidence"}}
    page.get_by_label("calibrated threshold").uncheck()
    assert visit.routing()["depth"] == {"exit": {"method": "confidence", "threshold": 0.8371}}
    threshold.press("Home")
    assert visit.routing()["depth"] == {"exit": {"method": "confidence", "threshold": 0.25}}


def test_without_a_measured_order_there_is_no_effort(
    console_server: Server, visiting: Callable[..., Visit]
) -> None:
    """What a server without a profile says, by hand."""
    visit = visiting(console_server.url)
    page = visit.page

    def other(route: Route) -> None:
        answer = route.fetch()
        found = answer.json()
        found["effort"] = {"available": False, "reason": "no profile", "lowest": 1, "levels": []}
        route.fulfill(response=answer, json=found)

    page.route("**/v1/routing/capabilities", other)
    visit.open()
    expect(page.locator("#effort-refused")).to_have_text("Not on this server: effort: no profile.")
    expect(page.get_by_role("radio", name="effort", exact=True)).to_be_disabled()
    visit.controls(preset="", depth="early exit")
    assert "exit" in visit.routing()["depth"]


def test_a_server_without_routing(console_server: Server, visiting: Callable[..., Visit]) -> None:
    """What such a server says, by hand: the demo model can be routed."""
    visit = visiting(console_server.url)
    page = visit.page

    def other(route: Route) -> None:
        answer = route.fetch()
        refused = {"supported": False, "reason": "the V2 runner is live"}
        experts = {**answer.json()["experts_routing"], **refused, "controls": {}}
        more = {"depth": {}, "effort": {}, "report": False, "experts_routing": experts}
        route.fulfill(response=answer, json={**answer.json(), **refused, **more})

    page.route("**/v1/routing/capabilities", other)
    visit.open()
    expect(page.locator("#policy-refused")).to_have_text(
        "Not on this server: the V2 runner is live."
    )
    for control in ("effort", "early exit"):
        expect(page.get_by_role("radio", name=control, exact=True)).to_be_disabled()
    full, _ = visit.run()
    assert "routing" not in full
    assert visit.state(FULL) == "done"


def test_presets_say_what_was_measured_and_same_ones_are_one_row(
    visit: Visit, console_server: Server
) -> None:
    with urllib.request.urlopen(f"{console_server.url}/v1/routing/presets", timeout=30) as response:
        presets = json.load(response)["data"]
    rows = visit.page.locator("label.preset")
    policies = {json.dumps(preset["policy"]) for preset in presets}
    assert len(policies) < len(presets), "the demo's profile has presets that are one setting"
    assert rows.count() == 1 + len(policies)
    measured = [preset for preset in presets if preset["measured"]]
    for preset in measured:
        named = visit.page.locator(".name", has_text=re.compile(rf"\b{preset['id']}\b"))
        row = rows.filter(has=named)
        figures = preset["measured"]
        for text in (
            f"{fixed(100 * figures['quality']['value'], 1)} %",
            f"{fixed(figures['speed']['value'], 2)}\u00d7",
            f"{fixed(100 * figures['compute_fraction'], 0)} %",
        ):
            expect(row).to_contain_text(text)
    expect(
        visit.page.get_by_role("radio", name="quality, balanced, fast: quality 1")
    ).to_have_count(1)


def test_what_clashes_with_the_preset_is_not_offered(visit: Visit) -> None:
    page = visit.page
    effort = page.get_by_role("radio", name="effort", exact=True)
    early = page.get_by_role("radio", name="early exit", exact=True)
    note = page.locator("#depth-clash")
    visit.controls(preset="", depth="effort")
    expect(note).to_be_hidden()
    visit.controls(preset="half-depth")
    expect(effort).to_be_disabled()
    expect(effort).not_to_be_checked()
    expect(early).to_be_enabled()
    expect(note).to_have_text("Preset half-depth cannot be combined with effort.")
    assert visit.routing() == {"preset": "half-depth", "report": True}
    visit.controls(preset="prompt-chosen")
    expect(early).to_be_disabled()
    expect(note).to_have_text("Preset prompt-chosen cannot be combined with effort or early exit.")
    visit.controls(preset="light")
    expect(effort).to_be_enabled()
    expect(early).to_be_disabled()


def test_what_is_offered_beside_a_preset_is_accepted(visit: Visit) -> None:
    page = visit.page
    for radio in page.locator("#presets input:enabled").all():
        radio.check()
        for control in page.locator('input[name="depth"]:enabled').all():
            control.check()
            own_threshold(visit)
            visit.run()
            assert visit.state(POLICY) == "done", visit.routing()
            if not control.is_enabled():
                break
        page.get_by_role("radio", name="not set").check()


def test_examples_are_the_servers_and_fill_the_message(
    visit: Visit, console_server: Server
) -> None:
    examples = capabilities(console_server)["examples"]
    buttons = visit.page.get_by_role("group", name="Example prompts").get_by_role("button")
    assert buttons.all_text_contents() == [*examples]
    message = visit.page.get_by_label("Message", exact=True)
    expect(message).to_have_value(next(iter(examples.values())))
    buttons.get_by_text("reverse").click()
    expect(message).to_have_value(examples["reverse"])
    full, _ = visit.run()
    assert full["messages"][-1]["content"] == examples["reverse"]


def test_exit_methods_are_in_words(visit: Visit, console_server: Server) -> None:
    methods = capabilities(console_server)["depth"]["exit"]
    visit.controls(preset="", depth="early exit")
    options = visit.page.get_by_label("Exit method").locator("option").all_text_contents()
    assert options == [f"{name}: {method['description']}" for name, method in methods.items()]
    expect(visit.page.locator("#exit-note")).to_contain_text("A token leaves ")


def test_no_method_is_known_by_its_name(console_server: Server) -> None:
    names = [*capabilities(console_server)["depth"]["exit"]]
    names += [*capabilities(console_server)["depth"]["adaptive"]]
    for path in Path(page.__file__).parent.glob("*.js"):
        for name in names:
            assert not re.search(rf"""["'`]{name}["'`]""", path.read_text()), (path.name, name)
