"""Charts of a run, as SVG for a light and for a dark page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.loadtest.report.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIGHT = {"ground": "#ffffff", "text": "#1b1f24", "line": "#d5d9e0"}
_DARK = {"ground": "#14171b", "text": "#e7e9ec", "line": "#363c46"}
# Okabe and Ito's, in a strength for either ground.
_COLOURS = {
    "light": ("#0072b2", "#c77700", "#00805c", "#b3261e", "#7a3ea3", "#5a6270"),
    "dark": ("#56b4e9", "#f0a63a", "#2fc79a", "#ff8a80", "#d0a2f0", "#a3abb8"),
}
_SIZE = (6.4, 3.0)

Draw = Callable[["Axes", Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart for both themes.

    Attributes:
        title: what it shows.
        said: the same in words, for who cannot see it.
        light: SVG as a `data:` address.
        dark: the same for a dark page.
    """

    title: str
    said: str
    light: str
    dark: str


def charts(results: Results) -> list[Chart]:
    """All charts that the run has something for."""
    found = [_latencies(results), _over_time(results)]
    if len(results.scenario.arrivals.stages) > 1:
        found.append(_stages(results))
    if results.scenario.turns is not None:
        found.append(_rounds(results))
    if results.memory is not None and results.memory.times:
        found.append(_memory(results))
    return [chart for chart in found if chart is not None]


def _chart(title: str, said: str, draw: Draw) -> Chart:
    return Chart(title, said, _svg(draw, "light", _LIGHT), _svg(draw, "dark", _DARK))


def _svg(draw: Draw, theme: str, tones: dict[str, str]) -> str:
    # Not pyplot, which would keep the figures and choose a display.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look: Any = {
        "svg.hashsalt": "sluice",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "figure.facecolor": tones["ground"],
        "axes.facecolor": tones["ground"],
        "axes.edgecolor": tones["line"],
        "axes.labelcolor": tones["text"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": tones["line"],
        "grid.linewidth": 0.6,
        "text.color": tones["text"],
        "xtick.color": tones["text"],
        "ytick.color": tones["text"],
        "legend.frameon": False,
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes, _COLOURS[theme])
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _latencies(results: Results) -> Chart | None:
    by_policy: dict[str, list[float]] = {}
    for each in results.sent:
        if each.ending == "answered":
            by_policy.setdefault(each.policy, []).append(each.latency)
    if not by_policy:
        return None

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        for number, (policy, seconds) in enumerate(by_policy.items()):
            ordered = 1000 * np.sort(seconds)
            shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
            axes.plot(ordered, shares, color=colours[number % len(colours)], label=policy)
        axes.set(xlabel="end to end, ms", ylabel="answers, %", ylim=(0, 100), xscale="log")
        axes.legend()

    said = "; ".join(
        f"{policy}: half of {len(values)} answers within {1000 * float(np.median(values)):.0f} ms"
        for policy, values in by_policy.items()
    )
    return _chart("Time to the end of an answer", said, draw)


def _over_time(results: Results) -> Chart | None:
    sent = results.sent
    if not sent:
        return None
    began = min(each.start for each in sent)
    last = max(each.end for each in sent) - began
    edges = np.linspace(0, last, 2 + min(120, int(last)))
    kinds = list(dict.fromkeys(each.ending for each in sent))

    def rate(times: list[float]) -> np.ndarray:
        return np.histogram(np.array(times) - began, edges)[0] / np.diff(edges)

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        axes.stairs(rate([each.start for each in sent]), edges, color=colours[5], label="sent")
        for number, kind in enumerate(kinds):
            ended = rate([each.end for each in sent if each.ending == kind])
            axes.stairs(ended, edges, color=colours[number], label=kind)
        axes.set(xlabel="seconds", ylabel="requests per second")
        axes.legend(ncols=3)

    said = f"{len(sent)} requests in {last:.0f} s; " + ", ".join(
        f"{sum(each.ending == kind for each in sent)} {kind}" for kind in kinds
    )
    return _chart("Requests over time", said, draw)


def _stages(results: Results) -> Chart:
    rows, rate = results.totals(), results.rate or 0.0

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        for turn in dict.fromkeys(row.phase.turn for row in rows):
            mine = [row for row in rows if row.phase.turn == turn]
            offered = [row.phase.stage * rate for row in mine]
            note = "" if results.scenario.turns is None else f", {turn}"
            for number, (name, style) in enumerate((("answers", "o"), ("goodput", "s"))):
                values = [
                    row.summary.answer_rate if name == "answers" else row.summary.goodput
                    for row in mine
                ]
                axes.plot(offered, values, style, color=colours[number], label=name + note)
        axes.axvline(rate, color=colours[5], linestyle=":", label="stage 1")
        axes.set(xlabel="requests per second, sent", ylabel="per second", ylim=(0, None))
        axes.legend()

    said = "; ".join(
        f"at {row.phase.stage:g} times the rate {row.summary.answer_rate:.1f} answers and "
        f"{row.summary.goodput:.1f} good ones per second"
        for row in rows
    )
    return _chart("Stages", said, draw)


def _rounds(results: Results) -> Chart:
    from matplotlib.ticker import MaxNLocator

    rows = results.totals()
    goodput = results.scenario.turns == "policies"
    turns = list(dict.fromkeys(row.phase.turn for row in rows))
    label = "good requests per second" if goodput else "tokens per second"

    def value(index: int) -> float:
        summary = rows[index].summary
        return summary.goodput if goodput else summary.throughput

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        for number, turn in enumerate(turns):
            mine = [index for index, row in enumerate(rows) if row.phase.turn == turn]
            rounds = [rows[index].phase.round + 1 for index in mine]
            colour = colours[number % len(colours)]
            axes.plot(rounds, [value(index) for index in mine], "o", color=colour, label=turn)
        axes.set(xlabel="round", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    said = "; ".join(
        f"{turn}: "
        + ", ".join(f"{value(i):.1f}" for i, row in enumerate(rows) if row.phase.turn == turn)
        for turn in turns
    )
    return _chart(f"Turns, {label}", said, draw)


def _memory(results: Results) -> Chart:
    memory = results.memory
    assert memory is not None
    seconds = np.array(memory.times) - memory.times[0]

    def draw(axes: Axes, colours: Sequence[str]) -> None:
        axes.plot(seconds, memory.values, color=colours[0])
        axes.set(xlabel="seconds", ylabel="resident MB")

    said = f"from {memory.values[0]:.0f} to {memory.values[-1]:.0f} MB"
    return _chart("Memory of the server's processes", said, draw)
