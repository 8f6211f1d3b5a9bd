"""Where things lie on charts."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sluice.models.offline.report.report_charts import Axis, BarChart, HeatMap
from sluice.models.offline.report.report_scatter import ScatterChart
from sluice.models.profile.fields import Interval


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 0.71], ["0", "0.2", "0.4", "0.6", "0.8"]),
        ([0.93, 1.61], ["0.8", "1", "1.2", "1.4", "1.6", "1.8"]),
        ([-1.0, 0.0], ["-1", "-0.5", "0"]),
        ([5.0, 5.0], ["4.5", "5", "5.5"]),
        ([0.0, 1234.0], ["0", "500", "1000", "1500"]),
        ([0.0, 3e-7], ["0", "1e-07", "2e-07", "3e-07"]),
    ],
)
def test_axes_have_round_ticks_that_hold_all_values(values: list[float], labels: list[str]) -> None:
    axis = Axis.over(values, 160.0, 12.0)
    assert [tick.label for tick in axis.ticks] == labels
    assert axis.low <= min(values)
    assert max(values) <= axis.high
    for tick in axis.ticks:
        assert axis.at(float(tick.label)) == pytest.approx(tick.at, abs=0.02)
    assert (axis.ticks[0].at, axis.ticks[-1].at) == (160.0, 12.0)


def test_bars_are_as_long_as_their_numbers() -> None:
    chart = BarChart.of("t", {"a": [0.5, 1.0, -0.25], "b": [0.0, 0.2, 0.4]})
    per_unit = chart.bars[1].height
    assert [bar.height / per_unit for bar in chart.bars] == pytest.approx(
        [0.5, 1.0, 0.25, 0.0, 0.2, 0.4], abs=1e-3
    )
    for bar, value in zip(chart.bars, (0.5, 1.0, -0.25, 0.0, 0.2, 0.4), strict=True):
        end = bar.y if value < 0 else bar.y + bar.height
        assert end == pytest.approx(chart.zero, abs=0.02), "they stand on the line, or hang from it"
    assert [bar.label for bar in chart.bars[:2]] == ["layer 0, a: 0.5", "layer 1, a: 1"]
    spans = sorted((bar.x, bar.x + bar.width) for bar in chart.bars)
    assert all(one[1] <= next_[0] + 0.02 for one, next_ in pairwise(spans))
    assert [tick.label for tick in chart.x] == ["0", "1", "2"]


def test_many_layers_make_a_wider_chart_with_fewer_labels() -> None:
    chart = BarChart.of("t", {"a": [1.0] * 96})
    assert chart.width > 96 * 16
    assert [tick.label for tick in chart.x[:3]] == ["0", "2", "4"]
    assert chart.bars[-1].x + chart.bars[-1].width < chart.width


def test_cells_lie_by_layer_and_expert() -> None:
    chart = HeatMap.of("t", [2, 5], [[0.0, 2.0], [4.0, 1.0]], {"super": [(5, 0), (3, 0), (2, 7)]})
    assert [cell.opacity for cell in chart.cells] == [0.04, 0.5, 1.0, 0.25]
    lower, upper = chart.cells[2], chart.cells[0]
    assert (lower.x, lower.y) == (upper.x, upper.y + chart.cell)
    (mark,) = chart.marks
    assert (mark.x, mark.y) == (lower.x + chart.cell / 2, lower.y + chart.cell / 2)
    assert [tick.label for tick in chart.rows] == ["2", "5"]


def test_experts_that_did_nothing_are_a_map_too() -> None:
    chart = HeatMap.of("t", [0], [[0.0, 0.0]], {})
    assert {cell.opacity for cell in chart.cells} == {0.04}


def at(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.05)


def test_dots_lie_within_their_intervals() -> None:
    points = [(at(1.0), at(90.0), "best", "a", "p"), (at(2.0), at(80.0), "beaten", "b", "")]
    chart = ScatterChart.of("t", "d", ("x", "y"), points)
    first, second = chart.dots
    assert first.x < second.x
    assert first.y < second.y, "more is further up"
    for dot in chart.dots:
        assert 0 < dot.x_low < dot.x < dot.x_high < chart.width
        assert chart.height > dot.y_low > dot.y > dot.y_high >= chart.top
        assert (dot.x - dot.x_low) == pytest.approx(2 * (dot.x_high - dot.x), abs=0.03)
    (name,) = chart.names
    assert (name.text, name.anchor) == ("p", "start")
    assert 0 < name.x - first.x < 20


def test_names_lie_on_the_page_and_not_on_each_other() -> None:
    """Three dots in the upper right corner, and one that stands alone."""
    spots = [(2.4, 99.9, "the first"), (2.4, 99.8, "the second"), (2.39, 99.9, "third")]
    points = [(at(x), at(y), "best", "", name) for x, y, name in [*spots, (1.0, 50.0, "alone")]]
    chart = ScatterChart.of("t", "d", ("x", "y"), points)
    boxes = []
    for name in chart.names:
        long = 6.5 * len(name.text)
        left = name.x if name.anchor == "start" else name.x - long
        boxes.append((left, left + long, name.y))
        assert left >= 0
        assert left + long <= chart.width
        assert chart.top - 5 < name.y < chart.height
    for place, (start, end, y) in enumerate(boxes):
        for other_start, other_end, other_y in boxes[place + 1 :]:
            assert abs(y - other_y) >= 12 or start >= other_end or other_start >= end
    assert {name.text: name.anchor for name in chart.names}["alone"] == "start"
    assert {name.text: name.anchor for name in chart.names}["the first"] == "end"
