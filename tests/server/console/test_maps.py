"""The maps of what the server ran."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Route, expect
from support.console_visit import FULL, SKIPS, Visit, fixed
from support.serving import Server

Colour = tuple[int, ...]
ALL_RAN: Colour = (0x1D, 0x4F, 0x7C, 255)
"""The last stop of the light ramp in console.css."""
NOTHING: Colour = (0, 0, 0, 0)


def utilization(server: Server) -> Any:
    with urllib.request.urlopen(f"{server.url}/v1/routing/utilization", timeout=30) as response:
        return json.load(response)


def table(visit: Visit, name: str) -> list[list[str]]:
    """Cells of a table, heads first."""
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    return list(visit.page.locator(f"#{name} tr").evaluate_all(script))


def unfolded(visit: Visit, *summaries: str) -> None:
    for summary in summaries:
        visit.page.get_by_text(summary, exact=True).click()


def cells(visit: Visit, canvas: str, rows: int, columns: int) -> list[list[Colour]]:
    """Colours in the middle of a map's cells."""
    script = """([id, rows, columns]) => {
        const canvas = document.getElementById(id);
        const pen = canvas.getContext("2d");
        const {data, width} = pen.getImageData(0, 0, canvas.width, canvas.height);
        const high = (canvas.height - 16) / rows, wide = (canvas.width - 28) / columns;
        const at = (row, column) => 4 * (
            Math.floor((row + 0.5) * high) * width + Math.floor(28 + (column + 0.5) * wide));
        return Array.from({length: rows}, (_, row) => Array.from({length: columns}, (_, column) =>
            [...data.slice(at(row, column), at(row, column) + 4)]));
    }"""
    found = visit.page.evaluate(script, [canvas, rows, columns])
    return [[tuple(colour) for colour in row] for row in found]


def test_maps_show_what_ran(visit: Visit, console_server: Server) -> None:
    expect(visit.page.locator("#time-note")).to_have_text(
        "Nothing has run since this page was opened."
    )
    before = utilization(console_server)
    visit.editor.fill(json.dumps(SKIPS))
    visit.run()
    unfolded(visit, "Layers as a table", "Experts as a table")
    after = utilization(console_server)
    ran = [
        [
            str(layer["layer"]),
            *(
                text
                for module in ("attention", "mlp")
                for counts in [[layer[module][name] - old[module][name] for name in layer[module]]]
                for text in [f"{fixed(100 * (counts[0] / sum(counts)), 1)} %", *map(str, counts)]
            ),
        ]
        for layer, old in zip(after["layers"], before["layers"], strict=True)
    ]
    expect(visit.page.locator("#time-table td").last).to_have_text(ran[-1][-1])
    assert table(visit, "time-table")[1:] == ran
    assert [row[1] for row in ran[:4]] == ["100.0 %"] * 4
    assert ran[7][1] != "100.0 %"
    chosen = [
        [str(new - old) for new, old in zip(*rows, strict=True)]
        for rows in zip(
            after["experts"]["selections"], before["experts"]["selections"], strict=True
        )
    ]
    assert [row[2:] for row in table(visit, "expert-table")[1:]] == chosen
    visit.page.get_by_label("Counted since").select_option("start")
    assert [row[2:] for row in table(visit, "expert-table")[1:]] == [
        [str(count) for count in row] for row in after["experts"]["selections"]
    ]


def test_maps_are_live(visit: Visit) -> None:
    visit.endless(1000)
    visit.at_once()
    visit.editor.fill(json.dumps(SKIPS))
    visit.run()
    painted = cells(visit, "time-map", rows=8, columns=60)
    # Without polls while it ran there would be one look, at the end. In a look in which both ran,
    # all rows ran layers 0 to 3 and some of them the others.
    columns = list(zip(*painted, strict=True))
    both = [c for c in columns if {*c[:4]} == {ALL_RAN} and not {ALL_RAN, NOTHING} & {*c[4:]}]
    assert len(both) >= 2
    experts = cells(visit, "expert-map", rows=8, columns=16)
    assert len({colour for row in experts for colour in row}) > 8
    label = visit.page.locator("#time-map").get_attribute("aria-label") or ""
    assert "layer 0 100.0 %" in label
    box = visit.page.locator("#expert-map").bounding_box()
    assert box
    visit.page.locator("#expert-map").hover(position={"x": box["width"] - 3, "y": 3})
    expect(visit.page.locator("#expert-readout")).to_contain_text("layer 0, expert 15: ")


def test_others_are_seen_when_watched_all_the_time(visit: Visit, console_server: Server) -> None:
    ask = console_server.client().chat.completions.create
    hello: Any = {"model": "demo", "messages": [{"role": "user", "content": "reverse abc"}]}
    visit.page.get_by_label("watch all the time").check()
    note, time_map = visit.page.locator("#time-note"), visit.page.locator("#time-map")
    for policy, layer_7 in (({}, "100.0 %"), ({"depth": {"skip": {"blocks": [7]}}}, "0.0 %")):
        ask(**hello, extra_body={"routing": policy})
        expect(note).to_contain_text("newest on the right")
        expect(time_map).to_have_attribute("aria-label", re.compile(f"layer 7 {layer_7}"))


def test_counters_that_began_anew_are_no_difference(visit: Visit, console_server: Server) -> None:
    script = """async ([before, after]) => {
        const {difference} = await import("/console/utilization.js");
        return difference(before, after);
    }"""
    visit.run()
    now = utilization(console_server)
    assert visit.page.evaluate(script, [now, now])["layers"][0]["mlp"] == {
        "executed": 0,
        "skipped": 0,
    }
    anew = {
        **now,
        "layers": [{**layer, "mlp": {"executed": 0, "skipped": 0}} for layer in now["layers"]],
    }
    assert visit.page.evaluate(script, [now, anew]) is None
    since_start = visit.page.evaluate(script, [None, now])
    assert since_start["experts"]["selections"] == now["experts"]["selections"]


def test_a_model_without_experts_has_no_map_of_them(
    console_server: Server, visiting: Callable[..., Visit]
) -> None:
    """What a dense model's server says, by hand: the demo model has experts."""
    visit = visiting(console_server.url)

    def dense(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "experts": None})

    visit.page.route("**/v1/routing/utilization", dense)
    visit.open()
    expect(visit.page.locator("#expert-note")).to_have_text("This engine counts no experts.")
    expect(visit.page.locator("#expert-map")).to_be_hidden()
    visit.run()
    expect(visit.page.locator("#time-map")).to_be_visible()
    expect(visit.column(FULL).locator(".request-map")).to_be_visible()
    expect(visit.column(FULL).locator(".request-map .experts")).to_be_hidden()
