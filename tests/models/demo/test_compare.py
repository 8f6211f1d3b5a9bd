"""What a policy took, summed from reports, and the table of policies."""

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from sluice.models.demo.compare import (
    PolicyResult,
    Work,
    averages,
    comparison,
    evaluate_policy,
)
from sluice.models.demo.evaluate import TaskScore, heldout_items
from sluice.models.demo.tasks import TASKS


def report(
    rows: int, compute: float, tokens: int, mean_layers: float | None, generated: float
) -> dict[str, Any]:
    layer = {"attention": {"executed": rows - 1, "skipped": 1, "filled": 0}}
    return {
        "layers": [layer, layer],
        "compute_fraction": compute,
        "generated": {
            "tokens": tokens,
            "mean_layers": mean_layers,
            "compute_fraction": generated,
        },
        "warnings": [],
    }


def test_reports_weigh_by_their_tokens() -> None:
    work = Work.of(
        [
            report(10, 1.0, 1, 2.0, 1.0),
            report(30, 0.6, 3, 1.0, 0.5),
            report(10, 1.0, 0, None, 1.0),
        ]
    )
    assert work == Work(
        generated_tokens=4,
        mean_layers=pytest.approx(1.25),
        generated_compute_fraction=pytest.approx(0.625),
        compute_fraction=pytest.approx(0.76),
    )


def test_a_report_that_counted_nothing_is_not_a_zero() -> None:
    lost = {"policy": {}, "warnings": ["the engine kept no record of this request"]}
    with pytest.raises(ValueError, match="kept no record"):
        Work.of([report(10, 1.0, 1, 2.0, 1.0), lost])
    with pytest.raises(ValueError, match="no report"):
        Work.of([report(10, 1.0, 0, None, 1.0)])


@pytest.mark.parametrize("routing", [{}, {"effort": 0.5}, {"preset": "fast", "report": False}])
def test_every_answer_is_asked_for_its_report(
    stub: tuple[str, list[dict[str, Any]]], routing: Mapping[str, Any]
) -> None:
    url, bodies = stub
    result = evaluate_policy(url, "m", heldout_items(2, seed=1), policy="p", routing=routing)
    assert len(bodies) == 2 * len(TASKS)
    assert all(body["routing"] == {**routing, "report": True} for body in bodies)
    assert result.work == Work(2 * len(bodies), 1.5, 0.25, 0.5)
    wire = json.loads(json.dumps(result.to_wire()))
    assert wire["exact_match"] == 0
    assert wire["mean_layers"] == 1.5
    assert wire["routing"] == routing
    assert set(wire["tasks"]) == set(TASKS)


def test_a_row_per_policy() -> None:
    scores = {"copy": TaskScore("copy", 4, 4, ()), "sort": TaskScore("sort", 4, 3, ())}
    work = Work(100, 5.25, 0.656, 0.8)
    results = [PolicyResult(name, {}, scores, work) for name in ("none", "[b]")]
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(comparison(results))
    rows = [line for line in console.export_text().splitlines() if "sort" in line]
    assert len(rows) == 2
    for name, row in zip(("none", "[b]"), rows, strict=True):
        for cell in (name, "87.5 %", "sort 75.0 %", "5.25", "65.6 %", "80.0 %"):
            assert cell in row
    assert averages(results[0]) == (
        "none: average exact match 87.5 %, 5.25 layers per generated token, "
        "65.6 % of full depth's compute on generated tokens, 80.0 % on all"
    )
