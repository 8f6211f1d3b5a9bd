"""A server whose profile has a frontier: presets, effort and thresholds that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from safetensors.torch import load_file
from support.full_profile import EXIT, MEASURED, frontier, level, point
from support.serving import Server, running_server

from sluice.models.offline.demo import DEMO_PROFILE_DIR
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import HEADS_NAME, REFERENCES_NAME, write_profile

LEVELS = [level(0.75, (6, 7), (6, 7)), level(0.5, (4, 5, 6, 7), (4, 5, 6, 7))]
FRONTIER = frontier(
    [
        point("full depth"),
        point("without blocks 6 and 7", depth={"skip": {"blocks": [6, 7]}}),
        point("half depth", depth={"skip": {"blocks": [4, 5, 6, 7]}}, experts={"top_k": 2}),
        point("of another model", depth={"skip": {"blocks": [8]}}),
    ],
    {
        "quality": "full depth",
        "balanced": "without blocks 6 and 7",
        "fast": "half depth",
        "odd": "of another model",
    },
    LEVELS,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, its own presets, and its profile with points that nobody measured."""
    folder = tmp_path_factory.mktemp("measured")
    fields = Profile.load(DEMO_PROFILE_DIR).fields
    write_profile(
        folder / "profile",
        {
            **fields.model_dump(exclude={"schema_version", "files", "digest"}),
            "frontier": FRONTIER,
            "exits": [{**EXIT, "layers": (1, 2, 3), "threshold": 0.875}],
        },
        load_file(DEMO_PROFILE_DIR / HEADS_NAME),
        load_file(DEMO_PROFILE_DIR / REFERENCES_NAME),
    )
    arguments = ["--enforce-eager", "--dtype", "float32", "--profile", str(folder / "profile")]
    with running_server(folder / "log", *arguments) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def ask(client: openai.OpenAI, model: str = "demo", **routing: Any) -> tuple[str, Any]:
    """The answer, and the report."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "sort 5 2 9 1 4"}],
        temperature=0,
        extra_body={"routing": {**routing, "report": True}},
    )
    return answer.choices[0].message.content or "", answer.routing  # type: ignore[attr-defined]


def test_measured_presets_are_listed_with_what_was_measured(client: openai.OpenAI) -> None:
    listed = client.get("/routing/presets", cast_to=dict[str, Any])["data"]
    presets = {entry["id"]: entry for entry in listed}
    assert {"shallow", "light", "quality", "balanced", "fast", "odd"} < {*presets}
    assert presets["shallow"]["measured"] is None
    assert presets["shallow"]["available"]
    fast = presets["fast"]
    assert fast["measured"]["speed"] == MEASURED
    assert fast["measured"]["quality"] == {"measure": "exact match", **MEASURED}
    assert (fast["available"], fast["model"]) == (True, "demo@fast")
    assert fast["policy"]["experts"] == {"top_k": 2}
    assert not presets["odd"]["available"]
    assert "layer 8 does not exist" in presets["odd"]["reason"]
    ids = {card.id for card in client.models.list().data}
    assert {"demo@quality", "demo@balanced", "demo@fast", "demo@shallow"} < ids
    assert "demo@odd" not in ids


def test_measured_presets_run_by_name_and_as_models(client: openai.OpenAI) -> None:
    answers = {name: ask(client, f"demo@{name}") for name in ("quality", "balanced", "fast")}
    fractions = [report["compute_fraction"] for _, report in answers.values()]
    assert fractions[0] == 1.0
    assert fractions == sorted(fractions, reverse=True)
    # Two blocks less, and with half of the blocks fewer experts: the LM head is a hundredth.
    assert 0.75 < fractions[1] < 0.77
    assert fractions[2] < 0.5
    for name, (text, report) in answers.items():
        again, by_name = ask(client, preset=name)
        assert (again, by_name["policy"]) == (text, report["policy"])
    assert answers["quality"][0] == "1 2 4 5 9"


def test_a_preset_that_this_engine_cannot_do(client: openai.OpenAI) -> None:
    for model, routing, param in (
        ("demo@odd", {}, "model"),
        ("demo", {"preset": "odd"}, "routing.preset"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, model, **routing)
        assert caught.value.param == param
        assert "preset 'odd' is not available: layer 8" in str(caught.value)


def test_requests_are_counted_by_measured_preset(server: Server, client: openai.OpenAI) -> None:
    def count(outcome: str) -> float:
        labels = frozenset({("preset", "balanced"), ("outcome", outcome)})
        return server.samples()["sluice_requests_total", labels]

    before = count("ok")
    ask(client, "demo@balanced")
    assert count("ok") == before + 1
    labels = frozenset({("preset", "odd"), ("outcome", "ok")})
    assert server.samples()["sluice_requests_total", labels] == 0


def test_effort_runs_between_the_measured_levels(client: openai.OpenAI) -> None:
    wire = client.get("/routing/capabilities", cast_to=dict[str, Any])
    assert (wire["effort"]["source"], wire["effort"]["lowest"]) == ("frontier", 0.5)
    for effort, attention, mlp in (
        (0.75, [6, 7], [6, 7]),
        (0.71, [6, 7], [5, 6, 7]),
        (0.5, [4, 5, 6, 7], [4, 5, 6, 7]),
    ):
        text, report = ask(client, effort=effort)
        assert report["policy"]["depth"]["skip"] == {"attention": attention, "mlp": mlp}
        assert report["generated"]["compute_fraction"] < 1.0
        assert text == "1 2 4 5 9"
    with pytest.raises(openai.BadRequestError, match=r"below 0\.5, the lowest") as caught:
        ask(client, effort=0.49)
    assert caught.value.param == "routing.effort"


def test_an_exit_takes_its_threshold_from_the_profile(client: openai.OpenAI) -> None:
    _, report = ask(client, depth={"exit": {"method": "confidence"}})
    rule = report["policy"]["depth"]["exit"]
    assert (rule["threshold"], rule["layers"]) == (0.875, [1, 2, 3])
    assert set(report["exit_layers"]) <= {1, 2, 3, 7}
    with pytest.raises(openai.BadRequestError, match="after layers 1, 2, 3, and these are 2"):
        ask(client, depth={"exit": {"method": "confidence", "layers": [2]}})
