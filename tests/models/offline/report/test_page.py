"""The page of a profile: its numbers, its parts, and that it is one safe file."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.html_page import Page

from sluice.models.offline.report.page import PARTS, report_page
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import write_profile

LAYERS, EXPERTS = 4, 3


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.03, "high": value + 0.02}


def point(name: str, quality: float, speed: float, best: bool, **routing: Any) -> dict[str, Any]:
    return {
        "name": name,
        "routing": routing,
        "quality": interval(quality),
        "speed": interval(speed),
        "compute_fraction": 0.8125,
        "generated_fraction": 0.6875,
        "on_frontier": best,
    }


def per_layer(first: float) -> list[float]:
    return [first / (layer + 1) for layer in range(LAYERS)]


def units(first: float) -> dict[str, list[float]]:
    return {name: per_layer(first + n / 10) for n, name in enumerate(("block", "attention", "mlp"))}


FIELDS: dict[str, Any] = {
    "model": {"layers": LAYERS, "hidden": 64, "fingerprint": "ab" * 32, "name": "org/model"},
    "calibration": {
        "importance": {
            "settings": {"future_prompts": 11},
            "examples": 17,
            "data": "cd" * 32,
            "key": "ef" * 32,
            "date": "2026-01-02",
            "versions": {"sluice": "9.8.7", "vllm": "6.5.4"},
        }
    },
    "importance": units(0.71),
    "layer_metrics": {
        "contribution": units(1.31),
        "turn": per_layer(-0.51),
        "future_effect": per_layer(0.23),
        "lim": per_layer(-0.97),
        "zd": per_layer(0.19),
    },
    "exits": [
        {
            "method": "confidence",
            "layers": [1, 2],
            "threshold": 0.8125,
            "tolerance": 0.05,
            "error": 0.1,
            "agreement": 0.9765625,
            "mean_layers": 2.375,
        }
    ],
    "saturation": per_layer(0.99),
    "super_experts": [[1, 2]],
    "expert_map": {
        "layers": [1, 3],
        "load": [[0.5, 0.25, 0.75], [0.125, 1.0, 0.375]],
        "maxima": [[3.5, 2.0, 70.0], [0.0, 1.25, 0.5]],
    },
    "behaviours": {
        "refusal": {
            "experts": [[3, 1], [1, 0]],
            "scores": [0.4375, 0.21875],
            "measure": "weight",
            "prompts": [31, 29],
        }
    },
    "expert_k": [{"budget": 5, "top_k": [1, 2, 1, 3], "divergence": 0.0625}],
    "skip_ratios": per_layer(0.61),
    "references": {"mine": {"layers": [1, 3], "width": 48, "encoder": "other"}},
    "skip_sets": {
        "found": {"attention": [3], "mlp": [2, 3], "quality": 0.9375, "seconds": 0.671875}
    },
    "frontier": {
        "measure": "exact match",
        "items": 123,
        "batch": 8,
        "device": "some processor",
        "points": [
            point("full depth", 0.97, 1.0, True),
            point("without two", 0.95, 1.4, True, depth={"skip": {"blocks": [2, 3]}}),
            point("bad idea", 0.5, 0.9, False, experts={"top_k": 1}),
        ],
        "presets": {"quality": "full depth", "balanced": "without two", "fast": "without two"},
        "effort": [{"effort": 0.75, "attention": [3], "mlp": [3], "quality": interval(0.9)}],
        "equal_compute": [
            {
                "chosen": "random",
                "seed": 4,
                "units": 2,
                "generated_fraction": 0.75,
                "quality": interval(0.8),
            },
            {
                "chosen": "chain",
                "units": 2,
                "generated_fraction": 0.75,
                "quality": interval(0.9),
            },
        ],
    },
}


def page(folder: Path, fields: dict[str, Any]) -> Page:
    write_profile(folder, fields, {}, {})
    return Page(report_page(Profile.load(folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "profile"


@pytest.fixture(scope="module")
def whole(folder: Path) -> Page:
    return page(folder, FIELDS)


def columns(table: list[list[list[Any]]]) -> dict[str, list[list[Any]]]:
    """Cells by the heading of their column."""
    head, *rows = table
    return {name[0]: [row[n] for row in rows] for n, name in enumerate(head)}


def numbers(cells: list[list[Any]]) -> list[float]:
    return [cell[0] for cell in cells]


def test_numbers_of_layers_are_the_profiles(whole: Page) -> None:
    importance, metrics = FIELDS["importance"], FIELDS["layer_metrics"]
    shown = columns(whole.tables["Importance"])
    for heading, unit in (("block", "block"), ("attention", "attention"), ("MLP", "mlp")):
        assert numbers(shown[heading]) == importance[unit]
    other = columns(whole.tables["Other measures"])
    for heading, unit in (("block", "block"), ("attention", "attention"), ("MLP", "mlp")):
        assert numbers(other[f"contribution, {heading}"]) == metrics["contribution"][unit]
    for heading in ("turn", "future effect", "lim", "zd"):
        assert numbers(other[heading]) == metrics[heading.replace(" ", "_")]
    for caption, heading, name in (
        ("Saturation thresholds", "threshold", "saturation"),
        ("Skip ratios", "ratio", "skip_ratios"),
    ):
        assert numbers(columns(whole.tables[caption])[heading]) == FIELDS[name]


def test_numbers_of_exits_are_the_profiles(whole: Page) -> None:
    shown = columns(whole.tables["Thresholds"])
    assert shown["method"] == [["confidence"]]
    assert shown["after layers"] == [["1, 2"]]
    for heading, value in (
        ("threshold", 0.8125),
        ("tolerated", 0.05),
        ("confidence", 0.9),
        ("agreement", 0.9765625),
        ("layers per token", 2.375),
    ):
        assert numbers(shown[heading]) == [value]


def test_numbers_of_experts_are_the_profiles(whole: Page) -> None:
    found = FIELDS["expert_map"]
    for caption, name in (("Share of tokens served", "load"), ("Largest output", "maxima")):
        _, *rows = whole.tables[f"{caption} by layer and expert"]
        assert [row[0] for row in rows] == [["1"], ["3"]]
        assert [[cell[0] for cell in row[1:]] for row in rows] == found[name]
    shown = columns(whole.tables["Most distinctive first"])
    assert (shown["layer"], shown["expert"]) == ([["3"], ["1"]], [["1"], ["0"]])
    assert numbers(shown["score"]) == [0.4375, 0.21875]
    budget = columns(whole.tables["From the largest budget on as they were found"])
    assert (budget["budget"], numbers(budget["sum of output changes"])) == ([["5"]], [0.0625])
    assert "layer 1, expert 2" in whole.text
    assert "31 prompts with the behaviour and 29 without" in whole.text


def test_numbers_of_the_frontier_are_the_profiles(whole: Page) -> None:
    shown = columns(whole.tables["All settings, as they were measured"])
    assert shown["preset"] == [["quality"], ["balanced, fast"], []]
    assert shown["on the frontier"] == [["yes"], ["yes"], ["no"]]
    for n, each in enumerate(FIELDS["frontier"]["points"]):
        assert shown["setting"][n] == [each["name"]]
        quality = [value for value in shown["exact match"][n] if isinstance(value, float)]
        assert quality == [each["quality"][end] for end in ("value", "low", "high")]
        speed = [v for v in shown["speed over full depth's"][n] if isinstance(v, float)]
        assert speed == [each["speed"][end] for end in ("value", "low", "high")]
        assert numbers(shown["compute, generated"])[n] == 0.6875
        assert numbers(shown["compute, all tokens"])[n] == 0.8125
    levels = columns(whole.tables["Each leaves out what the one before it does, and more"])
    assert (numbers(levels["effort"]), levels["without MLP"]) == ([0.75], [["3"]])
    other = columns(whole.tables["As many units left out, chosen otherwise"])
    assert (other["chosen"], other["seed"]) == ([["random"], ["chain"]], [["4"], []])


def test_what_is_to_be_copied_is_what_was_measured(whole: Page) -> None:
    for wanted in (
        *(each["routing"] for each in FIELDS["frontier"]["points"]),
        {"depth": {"exit": {"method": "confidence", "threshold": 0.8125, "layers": [1, 2]}}},
        {"depth": {"skip": {"attention": [3], "mlp": [2, 3]}, "phase": "decode"}},
        {"experts": {"top_k": [1, 2, 1, 3]}},
        {"experts": {"skip_ratio": FIELDS["skip_ratios"]}},
        {"future_prompts": 11},
    ):
        assert wanted in whole.copies


def test_how_it_was_made(whole: Page) -> None:
    (caption,) = (name for name in whole.tables if name.startswith("Steps of"))
    _, (step, date, examples, _) = whole.tables[caption]
    assert (step, date, examples) == (["importance"], ["2026-01-02"], ["17"])
    for text in ("ab" * 32, "4 layers, hidden size 64", "123 items", "some processor"):
        assert text in whole.text


def test_it_starts_with_what_a_reader_wants_and_ends_with_digests(whole: Page) -> None:
    starts = (
        "org/model",
        "4 layers, hidden size 64",
        "2026-01-02",
        "sluice 9.8.7, vllm 6.5.4",
        "quality",
    )
    ends = (
        "All settings, as they were measured",
        "Thresholds",
        "Steps of",
        "ab" * 32,
        "cd" * 6,
    )
    places = [whole.text.index(text) for text in starts]
    places += [whole.text.rindex(text) for text in ends]
    assert places == sorted(places)
    assert "not recorded" not in whole.text


def test_presets_of_one_setting_are_one_row(whole: Page) -> None:
    (caption,) = (name for name in whole.tables if name.startswith("Presets of"))
    assert "one row" in caption
    shown = columns(whole.tables[caption])
    assert shown["preset"] == [["quality"], ["balanced, fast"]]
    assert shown["setting"] == [["full depth"], ["without two"]]
    assert numbers(shown["compute, generated"]) == [0.6875, 0.6875]


def test_a_whole_profile_misses_nothing(whole: Page) -> None:
    assert not whole.of("p", **{"class": "missing"})
    assert "(missing)" not in whole.text


def test_an_empty_profile_says_what_it_lacks(tmp_path: Path) -> None:
    empty = page(tmp_path / "profile", {"model": FIELDS["model"]})
    assert len(empty.of("p", **{"class": "missing"})) == len(PARTS) + 1
    assert empty.text.count("(missing)") == len(PARTS)
    for heading, step in PARTS.values():
        assert heading in empty.text
        assert f"sluice calibrate {step}" in empty.text
    assert not empty.of("svg")


@pytest.mark.parametrize("name", [*FIELDS])
def test_any_part_may_be_alone_or_lack(tmp_path: Path, name: str) -> None:
    page(tmp_path / "alone", {"model": FIELDS["model"], name: FIELDS[name]})
    if name != "model":
        page(tmp_path / "lack", {key: part for key, part in FIELDS.items() if key != name})


def test_none_of_the_experts_is_super(tmp_path: Path) -> None:
    fields = {key: part for key, part in FIELDS.items() if key != "super_experts"}
    assert "None was found." in page(tmp_path / "profile", fields).text


def test_what_the_data_do_not_show_is_said(tmp_path: Path) -> None:
    fields = json.loads(json.dumps(FIELDS))
    fields["importance_evidence"] = {"prompts": 3, "notes": ["3 prompts show no order"]}
    fields["behaviours"]["refusal"] |= {"experts": [], "scores": [], "note": "no expert is <more>"}
    fields["expert_k"][0]["note"] = "draws show nothing"
    fields["frontier"]["notes"] = ["no setting is shown to be faster"]
    write_profile(tmp_path, fields, {}, {})
    html = report_page(Profile.load(tmp_path))
    for sentence in (
        "3 prompts show no order.",
        "No expert is &lt;more&gt;.",
        "Budget 5: draws show nothing.",
        "No setting is shown to be faster.",
    ):
        assert f'<p class="soft">{sentence}</p>' in html


def test_nothing_comes_from_outside(whole: Page, folder: Path) -> None:
    text = report_page(Profile.load(folder))
    for forbidden in ("http://", "https://", "//", "src=", "url(", "@import", "javascript:"):
        assert forbidden not in text, forbidden
    for tag, held in whole.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "base", "form"}
        assert not [name for name in held if name.startswith("on") or name == "style"]
        assert held.get("href", "#").startswith("#")


HOSTILE = """</code></title><script>alert("x")</script><img src=x onerror='y'>&lt;{{ 7 * 7 }}"""


def test_hostile_names_are_text(tmp_path: Path) -> None:
    fields = json.loads(json.dumps(FIELDS))
    made = fields["calibration"].pop("importance")
    fields["calibration"][HOSTILE] = {**made, "settings": {HOSTILE: HOSTILE}, "data": HOSTILE}
    fields["behaviours"] = {HOSTILE: fields["behaviours"]["refusal"]}
    fields["references"] = {HOSTILE: {"layers": [1], "width": 4, "encoder": HOSTILE}}
    fields["skip_sets"] = {HOSTILE: fields["skip_sets"]["found"]}
    fields["model"]["fingerprint"] = HOSTILE
    frontier = fields["frontier"]
    frontier["device"] = HOSTILE
    frontier["points"][1] |= {"name": HOSTILE, "routing": {HOSTILE: [HOSTILE]}}
    frontier["presets"] = {HOSTILE: HOSTILE, f"{HOSTILE}!": HOSTILE, "quality": "full depth"}
    # A folder's name has no slash.
    found = page(tmp_path / HOSTILE.replace("/", "|"), fields)
    tags = Counter(tag for tag, _ in found.elements)
    assert not tags.keys() & {"script", "img"}
    assert tags == Counter(tag for tag, _ in page(tmp_path / "tame", FIELDS).elements)
    for text in (HOSTILE, HOSTILE.replace("/", "|")):
        assert text in found.text
    assert {HOSTILE: [HOSTILE]} in found.copies
    assert {HOSTILE: HOSTILE} in found.copies


def test_charts_are_told_to_those_who_do_not_see_them(whole: Page) -> None:
    ids = [held["id"] for _, held in whole.elements if "id" in held]
    assert len(ids) == len({*ids})
    charts = whole.of("svg")
    assert len(charts) == 12
    for held in (*charts, *whole.of("section")):
        assert {*held["aria-labelledby"].split()} <= {*ids}
    assert all(held["role"] == "img" for held in charts)
    assert {held["href"][1:] for held in whole.of("a")} <= {*ids}
    for text in (
        "block: from 0.1775 in layer 3 to 0.71 in layer 0",
        "2 layers of 3 experts; the most is 70 (layer 1, expert 2), the least 0",
        "3 settings, 2 of them on the frontier",
    ):
        assert text in whole.text
    order = [int(tag[1]) for tag, _ in whole.elements if re.fullmatch("h[1-6]", tag)]
    assert order[0] == 1
    assert order.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(order))
    for held in whole.of("th"):
        assert held["scope"] in ("row", "col")


def test_experts_are_marked_on_the_map(whole: Page) -> None:
    titles = re.findall(r"layer \d, expert \d: (?:super|behaviour) expert", whole.text)
    both = ["layer 3, expert 1: behaviour expert", "layer 1, expert 0: behaviour expert"]
    assert titles == [*both, "layer 1, expert 2: super expert"] * 2
    cells = re.findall(r"layer (\d), expert (\d): ([\d.]+)", whole.text)
    measured = FIELDS["expert_map"]
    assert [float(value) for _, _, value in cells if value[0].isdigit()][: 4 * EXPERTS] == [
        value for name in ("load", "maxima") for row in measured[name] for value in row
    ]
    assert cells[EXPERTS] == ("3", "0", "0.125")
    assert "the strongest is 100.0 % of the tokens, or an output of 70" in whole.text


def test_a_dense_model_has_no_parts_about_experts_and_says_what_failed(tmp_path: Path) -> None:
    """What was tried comes with its reason, and a sentence on top says what to do."""
    fields = {key: FIELDS[key] for key in ("calibration", "importance", "frontier")}
    fields = json.loads(json.dumps(fields))
    fields["model"] = {**FIELDS["model"], "experts": False}
    frontier = fields["frontier"]
    frontier["presets"] = {}
    measured = {"agreement": interval(0.8125), "divergence": 0.25, "perplexity": 3.5}
    for each in frontier["points"]:
        each["tokens"] = measured
    frontier["noise"] = {**measured, "agreement": interval(0.9375)}
    frontier["failed"] = [
        {"name": "8 blocks", "routing": {"x": 1}, "reason": "agrees with 12 % of <tokens>"}
    ]
    fields["skipped_steps"] = {"routers": "no", "exits": "8 prompts are too few"}
    fields["exit_failures"] = {"entropy": "none keeps the tokens"}
    write_profile(tmp_path, fields, {}, {})
    html = report_page(Profile.load(tmp_path))
    page = Page(html)
    assert "This model gains nothing from skipping: serve it stock." in page.text
    assert html.index("serve it stock") < html.index("<nav")
    for heading in ("Experts", "Experts behind behaviours", "Skip ratios", "Re-mix references"):
        assert heading not in page.text
    assert "agrees with 12 % of &lt;tokens&gt;" in html
    assert "No threshold for entropy: none keeps the tokens." in page.text
    assert "Not in this profile: 8 prompts are too few." in page.text
    assert "this is the noise" in page.text
    frontier["presets"] = {"fast": frontier["points"][1]["name"]}
    write_profile(tmp_path, fields, {}, {})
    used = Page(report_page(Profile.load(tmp_path))).text
    assert f"Use preset fast ({frontier['points'][1]['name']})" in used
    assert "81.2% of its tokens" in used
