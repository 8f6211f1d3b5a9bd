"""Scoring, and the server backend against a stub server."""

from collections.abc import Iterator, Sequence

import pytest
from support.stub_server import Stub, stub_server

from sluice.models.offline.demo.evaluate import (
    evaluate_server,
    heldout_items,
    score,
    server_answerer,
)
from sluice.models.offline.demo.tasks.tasks import TASKS, is_heldout


def test_heldout_items_are_different_and_held_out() -> None:
    items = heldout_items(30, seed=1)
    assert tuple(items) == TASKS
    for group in items.values():
        assert len({item.prompt for item in group}) == 30
        assert all(is_heldout(item.prompt) for item in group)


def test_score_counts_exact_answers() -> None:
    items = heldout_items(10, seed=1, tasks=("copy", "add"))
    right = {item.prompt: item.answer for group in items.values() for item in group}
    wrong = items["add"][3]

    def answer(prompts: Sequence[str]) -> list[str]:
        return [f" {right[p]}\n" if p != wrong.prompt else right[p] + "0" for p in prompts]

    scores = score(items, answer)
    assert scores["copy"].exact_match == 1
    assert scores["add"].exact_match == pytest.approx(0.9)
    assert scores["add"].misses == ((wrong, wrong.answer + "0"),)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as server:
        yield server


def test_server_answers_come_back_in_order(stub: Stub) -> None:
    prompts = [f"prompt {index}" for index in range(20)]
    assert server_answerer(stub.url, "m", concurrency=4)(prompts) == [p[::-1] for p in prompts]
    bodies = stub.bodies("/v1/chat/completions")
    assert len(bodies) == 20
    assert all(body["temperature"] == 0 and "routing" not in body for body in bodies)


def test_routing_is_sent_with_every_request(stub: Stub) -> None:
    routing = {"depth": {"skip": {"blocks": [5]}}}
    scores = evaluate_server(stub.url, "m@fast", items_per_task=2, seed=1, routing=routing)
    assert set(scores) == set(TASKS)
    bodies = stub.bodies("/v1/chat/completions")
    assert len(bodies) == 2 * len(TASKS)
    assert all(body["routing"] == routing and body["model"] == "m@fast" for body in bodies)
