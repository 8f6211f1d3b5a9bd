"""The rows of the table, and the table in the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.full_profile import ADAPTER

from sluice.models.offline.real_model.policies import policies
from sluice.models.offline.real_model.table import BEGIN, END, joined, table, with_table
from sluice.models.profile.layer_fields import AdapterFields

DOCS = Path(__file__).parents[4] / "docs"


def share(value: float, difference: float = 0.0) -> dict[str, Any]:
    ends = {"value": difference, "low": difference - 0.02, "high": difference + 0.02}
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "difference": ends}


def quality(choices: Any) -> dict[str, Any]:
    measured = {"answers": share(0.25), "agreement": share(0.875), "compute_fraction": 0.504}
    return {"routing": {}, "choices": choices, **measured}


def ratio(policy: str, batch: int, value: float) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"policy": policy, "batch": batch, "decode_ratio": interval}


def test_a_row_per_policy() -> None:
    measured = {"full depth": quality(share(0.5)), "exit": quality(None)}
    rows = [ratio("no routing", 1, 0.97), ratio("no routing", 8, 1.0), ratio("exit", 1, 1.3)]
    found = joined(
        {"date": "2000-01-01", "policies": {**measured, "skip": quality(share(0.4, -0.1))}},
        {"tokens": 64, "rows": rows},
    )
    assert (found["quality"], found["speed"]) == ({"date": "2000-01-01"}, {"tokens": 64})
    lines = table(found).splitlines()
    assert lines[0].endswith("| compute | speed, batch 1 | speed, batch 8 |")
    shared = "25.0 % (15-35) | 87.5 % (78-98) | 50 %"
    assert lines[2:] == [
        f"| full depth | 50.0 % (40-60) |  | {shared} | 0.97 (0.87-1.07) | 1.00 (0.90-1.10) |",
        f"| exit |  |  | {shared} | 1.30 (1.20-1.40) |  |",
        f"| skip | 40.0 % (30-50) | -10.0 (-12.0 to -8.0) | {shared} |  |  |",
    ]


def test_rows_go_between_the_marks() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(document, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        with_table("before\n", "new")


def test_presets_that_are_one_point_are_one_row() -> None:
    found = policies({"quality": "level 1", "balanced": "level 1", "fast": "drop"}, {})
    names = [name for name in found if name.startswith("preset")]
    assert names == ["preset `quality`, `balanced`", "preset `fast`"]
    assert found[names[0]] == {"preset": "quality"}
    assert len(policies({}, {})) == len(found) - 2


def test_the_document_shows_the_file_beside_it() -> None:
    found = json.loads((DOCS / "real-model.json").read_text())
    document = (DOCS / "real-model.md").read_text()
    assert with_table(document, table(found)) == document
    assert {*policies({}, {})} < {*found["policies"]}


def test_an_adapter_stands_below_what_it_was_trained_for() -> None:
    blocks = {"attention": (4, 7), "mlp": (4, 7), "rank": 2}
    adapter = AdapterFields.model_validate({**ADAPTER, **blocks})
    bare, adapted = [*policies({}, {"without-2": adapter}).items()][-2:]
    skip = {"attention": [4, 7], "mlp": [4, 7]}
    assert bare == (
        "2 of 30 blocks left out of answers",
        {"depth": {"skip": skip, "phase": "decode"}},
    )
    assert adapted == (
        "2 of 30 blocks left out of answers, with adapter",
        {"depth": {"skip": {"adapter": "without-2"}}},
    )
