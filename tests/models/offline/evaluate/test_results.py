"""A policy's result as JSON."""

from __future__ import annotations

import json

import pytest
from support.scores import scored

from sluice.models.offline.evaluate.results import PolicyResult, Times
from sluice.models.offline.evaluate.work import Work

SCORES = {"copy": scored("copy", 4, 4), "sort": scored("sort", 4, 3)}
WORK = Work(100, 5.25, 0.656, 0.8)


def test_a_row_as_json() -> None:
    wire = PolicyResult("p", {"preset": "p"}, SCORES, WORK, ("careful",)).to_wire()
    wire = json.loads(json.dumps(wire))
    assert wire["routing"] == {"preset": "p"}
    assert wire["exact_match"] == 0.875
    assert wire["interval"] == pytest.approx([0.529, 0.978], abs=1e-3)
    assert wire["worst_task"] == {"task": "sort", "exact_match": 0.75}
    assert wire["tasks"] == {"copy": 1.0, "sort": 0.75}
    assert wire["items"] == {"copy": 4, "sort": 4}
    assert wire["intervals"]["copy"] == pytest.approx([0.510, 1.0], abs=1e-3)
    assert wire["warnings"] == ["careful"]
    assert (wire["generated_tokens"], wire["mean_layers"]) == (100, 5.25)
    assert "seconds_per_item" not in wire
    timed = PolicyResult("p", {}, SCORES, None, times=Times((1.0, 3.0), 0, 0.0)).to_wire()
    assert (timed["seconds_per_item"], timed["tokens_per_second"]) == (2.0, None)
    assert "mean_layers" not in PolicyResult("p", {}, SCORES, None).to_wire()
