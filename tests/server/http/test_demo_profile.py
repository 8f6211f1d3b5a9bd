"""What the demo model's shipped profile promises, on items that it was not made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_command
from support.serving import Server

from sluice.models.offline.demo.tasks.tasks import TASKS, distinct
from sluice.server.cli.evaluate import add_parser

ITEMS = 12
"""Of each of the 13 tasks."""
TRAINED = {
    "q_exit": {"depth": {"exit": {"method": "q_exit"}}},
    "classifier": {"depth": {"exit": {"method": "classifier"}}},
    "first": {"depth": {"adaptive": {"method": "first", "threshold": 0.5}}},
}


@pytest.fixture(scope="module")
def rows(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `sluice eval`, by policy; full depth is `none`."""
    folder = tmp_path_factory.mktemp("eval")
    tasks, found = folder / "tasks.jsonl", folder / "found.json"
    lines = [
        json.dumps({"prompt": item.prompt, "answer": item.answer, "task": task})
        for task in TASKS
        for item in distinct(task, "heldout", 21, ITEMS)
    ]
    tasks.write_text("\n".join(lines))
    names = ["none", "fast", "balanced", "quality", *map(json.dumps, TRAINED.values())]
    arguments: list[str | Path] = ["--url", f"{server.url}/v1", "--api-key", server.api_key]
    arguments += ["--tasks", tasks, "--max-tokens", "48", "--json", found]
    arguments += [part for name in names for part in ("--policy", name)]
    assert run_command(add_parser, "eval", *arguments) == 0
    given = json.loads(found.read_text())
    keys = ["none", "fast", "balanced", "quality", *TRAINED]
    return dict(zip(keys, given, strict=True))


@pytest.mark.parametrize(("preset", "points"), [("fast", 3), ("balanced", 1), ("quality", 1)])
def test_presets_keep_their_promise(rows: dict[str, Any], preset: str, points: int) -> None:
    """Exact match, averaged over the tasks, against full depth's, in points."""
    assert 100 * (rows["none"]["exact_match"] - rows[preset]["exact_match"]) <= points


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_presets_that_are_faster_do_less(rows: dict[str, Any], preset: str) -> None:
    assert rows[preset]["compute_fraction"] < rows["none"]["compute_fraction"]


@pytest.mark.parametrize("method", TRAINED)
def test_what_was_trained_keeps_the_answers(rows: dict[str, Any], method: str) -> None:
    """With the profile's own thresholds, where the method has one."""
    assert rows[method]["exact_match"] >= rows["none"]["exact_match"] - 0.03
    assert rows[method]["mean_layers"] <= 0.75 * rows["none"]["mean_layers"]
