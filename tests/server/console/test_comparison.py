"""What the page says of the two answers beside each other, and of the tokens in them."""

from __future__ import annotations

import json
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
from playwright.sync_api import Route, expect
from support.console_visit import CHAT, FULL, POLICY, SKIPS, Visit
from support.serving import Server

EXITS = {"depth": {"exit": {"method": "confidence", "threshold": 0.9, "layers": [1, 2, 3]}}}


def report(body: dict[str, Any], server: Server) -> Any:
    """The report of the same request without a stream."""
    whole = {name: value for name, value in body.items() if not name.startswith("stream")}
    extra = {"routing": whole.pop("routing")}
    return server.client().chat.completions.create(**whole, extra_body=extra).model_extra["routing"]


def tokens(visit: Visit, title: str) -> list[tuple[str, int]]:
    """Text and layer of each coloured piece of an answer."""
    script = "all => all.map(each => [each.textContent, Number(each.dataset.layer)])"
    pieces = visit.column(title).locator(".text .token").evaluate_all(script)
    return [(text, layer) for text, layer in pieces]


def answering(visit: Visit, *texts: str) -> None:
    """Have the server's answers be these texts, one after the other, each in two chunks."""
    left = [*texts]

    def fulfil(route: Route) -> None:
        text = left.pop(0)
        chunks = [
            {"choices": [{"delta": {"content": part}}], "usage": {"completion_tokens": count}}
            for count, part in enumerate((text[:3], text[3:]), start=1)
        ]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(body=f"{events}data: [DONE]\n\n")

    visit.page.route(CHAT, fulfil)


def test_each_token_has_the_layer_it_left_after(visit: Visit, console_server: Server) -> None:
    visit.controls(prompt="lookup a3 f7 c1 h9 fah")
    visit.editor.fill(json.dumps({**EXITS, "report": True}))
    _, chosen = visit.run()
    assert {layer for _, layer in tokens(visit, FULL)} == {7}
    layers = report(chosen, console_server)["token_layers"]
    pieces = tokens(visit, POLICY)
    assert "".join(text for text, _ in pieces) == visit.text(POLICY)
    # The last token says that the answer ends: it has no text.
    assert [layer for _, layer in pieces] == layers[: len(pieces)]
    assert {*layers} - {7}, "an example in which some token leaves early"
    shown = visit.column(POLICY).locator(".left")
    for layer in {*layers}:
        expect(shown).to_contain_text(f"{layers.count(layer)} after {layer}")
    script = """all => Object.fromEntries(all.map(each =>
        [each.dataset.layer, getComputedStyle(each).backgroundColor]))"""
    by_layer = visit.column(POLICY).locator(".text .token").evaluate_all(script)
    assert len({*by_layer.values()}) == len(by_layer) > 1


def test_answers_that_are_the_same(visit: Visit) -> None:
    visit.controls(prompt="sort 7 1 8 2 8", preset="half-depth")
    visit.run()
    said = visit.page.locator("#comparison")
    expect(said.locator(".verdict")).to_have_text("Same answer")
    expect(visit.page.locator("mark")).to_have_count(0)
    compute = round(float(visit.meter(POLICY, "generated").removesuffix(" %")))
    expect(said).to_contain_text(f"{compute} % compute for the answer")


def test_answers_that_differ_are_marked_where_they_do(visit: Visit) -> None:
    answering(visit, "the cat sat on the mat", "the dog sat on a mat")
    visit.run()
    expect(visit.page.locator(".verdict")).to_have_text("Answers differ")
    expect(visit.page.locator("#comparison")).to_contain_text("2 of 6 words differ")
    for title, marked in ((FULL, ["cat", "the"]), (POLICY, ["dog", "a"])):
        assert visit.column(title).locator("mark").all_text_contents() == marked
    answering(visit, "one two three", "one two three")
    visit.run()
    expect(visit.page.locator(".verdict")).to_have_text("Same answer")
    expect(visit.page.locator("mark")).to_have_count(0)


@pytest.mark.parametrize(
    ("left", "right", "marks"),
    [
        ("", "", [[], []]),
        ("a b", "", [[[0, 3]], []]),
        ("a b c", "a c", [[[2, 4]], []]),
        ("1 2 3", "1 3 2", [[[2, 4]], [[3, 5]]]),
        ("\u00e9t\u00e9 \u65e5\u672c", "\u00e9t\u00e9 \u65e5", [[[4, 6]], [[4, 5]]]),
    ],
)
def test_differences(visit: Visit, left: str, right: str, marks: Any) -> None:
    script = """async ([left, right]) => {
        const {differences} = await import("/console/difference.js");
        return differences(left, right);
    }"""
    assert visit.page.evaluate(script, [left, right]) == marks
    for text, ranges in zip((left, right), marks, strict=True):
        assert all(0 <= low < high <= len(text) for low, high in ranges)
        assert all(one[1] < two[0] for one, two in pairwise(ranges))


def test_runs_in_turn_are_the_default_and_medians_are_shown(
    visit: Visit, console_server: Server
) -> None:
    page = visit.page
    page.goto(f"{console_server.url}/console")
    expect(page.locator("#connection")).to_have_text("Connected.")
    expect(page.get_by_label("one after the other")).to_be_checked()
    expect(page.locator("#rounds")).to_have_value("3")
    visit.endless(150)
    visit.editor.fill(json.dumps(SKIPS))
    visit.run()
    skips = ["depth" in body["routing"] for body in visit.bodies]
    assert skips == [False, True] * 3
    expect(page.locator("#comparison")).to_contain_text("Medians of 3 runs each, in turn.")
    middle = {}
    for title in (FULL, POLICY):
        middle[title] = float(visit.meter(title, "rate"))
        low, high = visit.column(title).locator('[data-spread="rate"]').inner_text().split(" to ")
        assert float(low) <= middle[title] + 1
        assert middle[title] <= float(high) + 1
    ratio = page.locator("#comparison .figure").first.inner_text()
    assert ratio.endswith("\u00d7 the tokens/s")
    assert abs(float(ratio.split("\u00d7")[0]) - middle[POLICY] / middle[FULL]) < 0.02
    page.get_by_label("both at once").check()
    expect(page.locator("#rounds")).to_be_disabled()
    visit.run()
    expect(page.locator("#comparison")).to_contain_text("Both ran at once")


def test_the_median(visit: Visit) -> None:
    script = """async (numbers) => {
        const {median} = await import("/console/comparison.js");
        return median(numbers);
    }"""
    for numbers in ([3.0], [1.0, 10.0], [5.0, 1.0, 100.0]):
        assert visit.page.evaluate(script, numbers) == median(numbers)
    assert visit.page.evaluate(script, []) is None


def test_repeated_runs_that_say_something_else(visit: Visit) -> None:
    visit.rounds(3)
    answering(visit, "a b", "a b", "a b", "a c", "a b", "a b")
    visit.run()
    expect(visit.page.locator(".verdict")).to_have_text("Same answer")
    expect(visit.page.locator("#comparison")).to_contain_text("Repeated runs gave other texts")


def test_a_request_that_ran_alone_has_a_map_of_its_experts(
    visit: Visit, console_server: Server
) -> None:
    visit.controls(prompt="sort 7 1 8 2 8", preset="half-depth-decode")
    visit.run()
    for title, share in ((FULL, "100 %"), (POLICY, "layer 7 ")):
        own = visit.column(title).locator(".request-map")
        layers = own.locator("canvas.layers").get_attribute("aria-label") or ""
        assert share in layers
        experts = own.locator(".experts canvas")
        expect(experts).to_be_visible()
        label = experts.get_attribute("aria-label") or ""
        assert label.count("layer ") == 8
        assert "none" not in label
    visit.at_once()
    visit.run()
    for title in (FULL, POLICY):
        own = visit.column(title).locator(".request-map .experts")
        expect(own.locator("canvas")).to_be_hidden()
        expect(own).to_contain_text("Its experts cannot be told apart")
