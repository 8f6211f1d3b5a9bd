"""Prompts to try a server with."""

from __future__ import annotations

from typing import Any

from support.serving import Server

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.server.http.examples import example_prompts


def test_the_demo_answers_its_examples_right(server: Server) -> None:
    answers = {
        "sort": "1 2 4 5 9",
        "add": "85",
        "reverse": "eciuls",
        "max": "87",
        "lookup": "f7 a3 h9",
        "two hops": "ag4",
        "fact": "nairobi",
    }
    examples = example_prompts(str(DEMO_MODEL_DIR))
    assert {*examples} == {*answers}
    ask = server.client().chat.completions.create
    said = {
        name: ask(model="demo", messages=[{"role": "user", "content": prompt}], temperature=0)
        .choices[0]
        .message.content
        for name, prompt in examples.items()
    }
    assert said == answers


def test_the_server_lists_those_of_its_model(server: Server) -> None:
    listed = server.client().get("/routing/capabilities", cast_to=dict[str, Any])
    assert listed["examples"] == example_prompts(str(DEMO_MODEL_DIR))


def test_other_models_get_general_ones() -> None:
    general = example_prompts("org/model")
    assert general
    assert not {*general.values()} & {*example_prompts(str(DEMO_MODEL_DIR)).values()}
