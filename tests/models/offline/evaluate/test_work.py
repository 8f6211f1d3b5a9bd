"""What policies took, summed from reports."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.models.offline.evaluate.work import NothingCountedError, Work


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
    work = Work.of_reports(
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


def test_without_a_generated_token_there_is_no_mean() -> None:
    assert Work.of_reports([report(10, 0.75, 0, None, 1.0)]) == Work(0, None, None, 0.75)


def test_a_report_that_counted_nothing_is_not_a_zero() -> None:
    lost = {"policy": {}, "warnings": ["the engine kept no record of this request"]}
    with pytest.raises(NothingCountedError, match="kept no record"):
        Work.of_reports([report(10, 1.0, 1, 2.0, 1.0), lost])
    with pytest.raises(NothingCountedError, match="no report"):
        Work.of_reports([])
