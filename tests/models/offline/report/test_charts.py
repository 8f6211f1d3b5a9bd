"""Charts show a profile's numbers: where bars, cells and points are, and what they say."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from support.full_profile import point
from support.html_page import Page

from sluice.models.offline.report import figures
from sluice.models.offline.report.charts import (
    equal_compute_chart,
    expert_map,
    frontier_chart,
    layer_bars,
    write_plots,
)
from sluice.models.offline.report.figures import Chart
from sluice.models.profile.frontier_fields import EqualCompute, FrontierFields, FrontierPoint
from sluice.models.profile.values import Interval


def legend(figure: Figure) -> list[str]:
    legends = figure.legends or [axes.get_legend() for axes in figure.axes]
    return [text.get_text() for each in legends if each for text in each.get_texts()]


def artist(figure: Figure, gid: str) -> Any:
    (found,) = figure.findobj(lambda each: each.get_gid() == gid)
    return found


def test_bars_are_as_long_as_their_numbers() -> None:
    series = {"a": [0.5, 1.0, -0.25], "b": [0.0, 0.2, 0.4]}
    chart = layer_bars("t", series)
    (axes,) = chart.figure.axes
    bars = [each for each in axes.patches if isinstance(each, Rectangle)]
    assert [bar.get_height() for bar in bars] == [0.5, 1.0, -0.25, 0.0, 0.2, 0.4]
    assert {bar.get_y() for bar in bars} == {0}, "they stand on the line, or hang from it"
    assert [round(bar.get_x() + bar.get_width()) for bar in bars] == [0, 1, 2] * 2
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(one[1] <= next_[0] + 1e-9 for one, next_ in pairwise(spans))
    assert bars[0].get_facecolor() != bars[3].get_facecolor()
    assert legend(chart.figure) == ["a", "b"]
    low, high = axes.get_ylim()
    assert low <= -0.25
    assert high >= 1.0
    assert chart.labels["bar-0-1"] == ["layer 1, a: 1"]
    assert "a: from -0.25 in layer 2 to 1 in layer 1" in chart.description


def test_many_layers_make_a_wider_chart_with_fewer_labels() -> None:
    figure = layer_bars("t", {"a": [1.0] * 96}).figure
    assert figure.get_figwidth() * 96 > 96 * 14
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())
    assert len(figure.axes[0].get_xticks()) < 30
    assert not legend(figure)


def test_cells_lie_by_layer_and_expert() -> None:
    marks = {"super": [(5, 0), (3, 0), (2, 7)], "behaviour": [(4, 1)]}
    chart = expert_map("t", [2, 5], [[0.0, 2.0], [4.0, 1.0]], marks)
    (axes,) = chart.figure.axes
    mesh = artist(chart.figure, "cells")
    assert isinstance(mesh, QuadMesh)
    assert mesh.get_array().tolist() == [[0.0, 2.0], [4.0, 1.0]]
    strength = mesh.to_rgba(mesh.get_array().ravel())[:, 3]
    assert strength.tolist() == pytest.approx([0.04, 0.52, 1.0, 0.28], abs=0.01)
    assert axes.yaxis_inverted(), "layers go downwards"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert artist(chart.figure, "super").get_offsets().tolist() == [[0.5, 1.5]]
    assert chart.labels["super"] == ["layer 5, expert 0: super expert"]
    assert legend(chart.figure) == ["super expert"], "no behaviour expert is on the map"
    assert chart.labels["cells"][2] == "layer 5, expert 0: 4"


def test_many_experts_have_fewer_labels() -> None:
    figure = expert_map("t", [0], [[1.0] * 100], {}).figure
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:3] == ["0", "4", "8"]
    assert figure.get_figwidth() > 100 * 0.18


def test_experts_that_did_nothing_are_a_map_too() -> None:
    mesh = artist(expert_map("t", [0], [[0.0, 0.0]], {}).figure, "cells")
    assert {*mesh.to_rgba(mesh.get_array().ravel())[:, 3]} == {0.04}


def interval(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.05)


def measured(name: str, quality: float, speed: float, share: float, best: bool) -> FrontierPoint:
    fields = {"quality": interval(quality), "speed": interval(speed)}
    given = point(name) | fields | {"generated_fraction": share, "on_frontier": best}
    return FrontierPoint.model_validate(given)


def other(chosen: str, share: float, quality: float, seed: int | None = None) -> EqualCompute:
    return EqualCompute.model_validate(
        {
            "chosen": chosen,
            "seed": seed,
            "units": 2,
            "generated_fraction": share,
            "quality": interval(quality),
        }
    )


FRONTIER = FrontierFields(
    measure="exact match",
    items=100,
    batch=8,
    device="a CPU",
    points=(
        measured("full", 0.9, 1.0, 1.0, True),
        measured("$x$ <b>", 0.8, 2.0, 0.5, True),
        measured("slow", 0.5, 0.7, 0.75, False),
    ),
    presets={"quality": "full", "fast": "$x$ <b>", "balanced": "full"},
    effort=(),
    equal_compute=(
        other("chain", 0.75, 0.9),
        other("chain", 0.5, 0.8),
        other("random", 0.75, 0.4, 1),
        other("random", 0.75, 0.3, 2),
    ),
)


def test_points_and_their_intervals_are_the_frontiers() -> None:
    chart = frontier_chart(FRONTIER)
    axes, _ = chart.figure.axes
    dots = artist(chart.figure, "points")
    assert isinstance(dots, PathCollection)
    assert dots.get_offsets().tolist() == [[1.0, 90.0], [2.0, 80.0], [0.7, 50.0]]
    assert dots.get_array().tolist() == [100.0, 50.0, 75.0]
    ringed, ringed_too, plain = dots.get_edgecolors().tolist()
    assert ringed == ringed_too != plain
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    ends = [sorted(segment.round(6).tolist()) for each in lines for segment in each.get_segments()]
    assert [[0.9, 90.0], [1.05, 90.0]] in ends
    assert [[2.0, 70.0], [2.0, 85.0]] in ends
    assert len(ends) == 6
    assert legend(chart.figure) == ["quality, balanced: full", "fast: $x$ <b>"]
    assert chart.labels["points"][2].startswith("slow: exact match 50.0 (40.0-55.0), speed 0.70")


def test_one_wide_interval_does_not_press_the_points_together() -> None:
    """As of a single slow round: the axis stays at the points, and an arrow says where it goes."""
    wide = measured("wide", 0.7, 0.9, 0.9, False)
    wide = wide.model_copy(update={"speed": Interval(value=0.9, low=0.2, high=15.0)})
    fields = FRONTIER.model_copy(update={"points": (*FRONTIER.points, wide)})
    chart = frontier_chart(fields)
    axes, _ = chart.figure.axes
    left, right = axes.get_xlim()
    assert right - left < 3 * (2.0 - 0.7)
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    ends = [x for each in lines for segment in each.get_segments() for x, _ in segment]
    assert all(left <= x <= right for x in ends)
    arrows = {line.get_marker(): [*line.get_xdata()] for line in axes.lines}
    assert arrows[">"] == [right]
    assert "1 intervals of speed reach beyond the chart" in chart.description
    assert "reach beyond" not in frontier_chart(FRONTIER).description


def test_other_choices_lie_by_their_compute() -> None:
    chart = equal_compute_chart(FRONTIER)
    (axes,) = chart.figure.axes
    assert artist(chart.figure, "chain").get_offsets().tolist() == [[75.0, 90.0], [50.0, 80.0]]
    assert artist(chart.figure, "random").get_offsets().tolist() == [[75.0, 40.0], [75.0, 30.0]]
    assert legend(chart.figure) == ["calibrated levels", "random"]
    assert axes.xaxis_inverted(), "less compute to the right"
    assert chart.labels["random"][0] == "random, 2 units: 40.0 (30.0-45.0)"


def test_plots_are_files(tmp_path: Path) -> None:
    assert [path.name for path in write_plots(FRONTIER, tmp_path)] == [
        "frontier.png",
        "equal_compute.png",
    ]
    lone = FRONTIER.model_copy(update={"equal_compute": ()})
    (path,) = write_plots(lone, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_becomes_a_part_of_a_page() -> None:
    """Names as they are, a title for each shape, the page's colours, and only its own ids."""
    text = frontier_chart(FRONTIER).svg("first")
    page = Page(text)
    ids = [held["id"] for _, held in page.elements if "id" in held]
    assert len(ids) == len({*ids})
    assert all(each.startswith("first-") for each in ids)
    assert {held["href"][1:] for _, held in page.elements if "href" in held} <= {*ids}
    assert page.elements[0][1]["aria-labelledby"] == "first-title first-description"
    assert "fast: $x$ <b>" in page.text
    assert [line for line in page.text.split("\n") if "slow: exact match" in line]
    for tag, held in page.elements:
        assert tag not in ("style", "metadata", "image")
        assert not held.keys() & {"style", "xmlns", "clip-path"}
    colours = {*re.findall(r'(?:fill|stroke)="(#\w+|var\([^)]*\))"', text)}
    assert {"var(--text)", "var(--s3)", "var(--ground)", "var(--line)"} <= colours
    assert frontier_chart(FRONTIER).svg("first") == text


def test_the_pages_style_has_the_figures_colours_in_light_and_dark() -> None:
    style = (Path(figures.__file__).parent / "base.css").read_text()
    for variable in figures._VARIABLES.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert len(re.findall(rf"{name}: #", style)) == 2, name


def test_control_characters_in_a_name_do_no_harm() -> None:
    chart = layer_bars("t", {"a\x01b": [1.0], "c": [2.0]})
    assert "a b" in Page(chart.svg("x")).text


def test_every_shape_has_its_label() -> None:
    chart = layer_bars("t", {"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="zip"):
        Chart("t", "d", chart.figure, {"bar-0-0": ["one", "two"]}).svg("x")
