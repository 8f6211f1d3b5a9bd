"""Charts of a run."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from sluice.loadtest.report.results import Results
from sluice.models.offline.report.figures import SERIES, SOFT, Chart, styled


@styled
def charts(results: Results) -> list[Chart]:
    """All charts that the run has something for."""
    drawn = [_latencies(results), _over_time(results)]
    if len(results.scenario.arrivals.stages) > 1:
        drawn.append(_stages(results))
    if results.scenario.turns is not None:
        drawn.append(_rounds(results))
    if results.memory is not None and results.memory.times:
        drawn.append(_memory(results))
    return [chart for chart in drawn if chart is not None]


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    return figure, figure.subplots()


def _latencies(results: Results) -> Chart | None:
    by_policy: dict[str, list[float]] = {}
    for each in results.requests:
        if each.ending == "answered":
            by_policy.setdefault(each.policy, []).append(each.latency)
    if not by_policy:
        return None
    figure, axes = _axes()
    for number, (policy, seconds) in enumerate(by_policy.items()):
        ordered = 1000 * np.sort(seconds)
        shares = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(ordered, shares, color=SERIES[number % len(SERIES)], label=policy)
    axes.set(xlabel="end to end, ms", ylabel="answers, %", ylim=(0, 100), xscale="log")
    # Its usual labels are formulas.
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.legend()
    description = "; ".join(
        f"{policy}: half of {len(values)} answers within {1000 * float(np.median(values)):.0f} ms"
        for policy, values in by_policy.items()
    )
    return Chart("Time to the end of an answer", description, figure)


def _over_time(results: Results) -> Chart | None:
    requests = results.requests
    if not requests:
        return None
    began = min(each.start for each in requests)
    last = max(each.end for each in requests) - began
    edges = np.linspace(0, last, 2 + min(120, int(last)))
    kinds = list(dict.fromkeys(each.ending for each in requests))

    def rate(times: list[float]) -> np.ndarray:
        return np.histogram(np.array(times) - began, edges)[0] / np.diff(edges)

    figure, axes = _axes()
    axes.stairs(rate([each.start for each in requests]), edges, color=SOFT, label="sent")
    for number, kind in enumerate(kinds):
        ended = rate([each.end for each in requests if each.ending == kind])
        axes.stairs(ended, edges, color=SERIES[number], label=kind)
    axes.set(xlabel="seconds", ylabel="requests per second")
    figure.legend(loc="outside upper left", ncols=len(kinds) + 1)
    description = f"{len(requests)} requests in {last:.0f} s; " + ", ".join(
        f"{sum(each.ending == kind for each in requests)} {kind}" for kind in kinds
    )
    return Chart("Requests over time", description, figure)


def _stages(results: Results) -> Chart:
    rows, rate = results.totals(), results.rate or 0.0
    figure, axes = _axes()
    for number, turn in enumerate(dict.fromkeys(row.phase.turn for row in rows)):
        of_turn = [row for row in rows if row.phase.turn == turn]
        offered = [row.phase.stage * rate for row in of_turn]
        note = "" if results.scenario.turns is None else f", {turn}"
        for name, style in (("answers", "o"), ("goodput", "s")):
            values = [
                row.summary.answer_rate if name == "answers" else row.summary.goodput
                for row in of_turn
            ]
            axes.plot(offered, values, style, color=SERIES[number % len(SERIES)], label=name + note)
    axes.axvline(rate, color=SOFT, linestyle=":", label="stage 1")
    axes.set(xlabel="requests per second, sent", ylabel="per second", ylim=(0, None))
    axes.legend()
    description = "; ".join(
        f"at {row.phase.stage:g} times the rate {row.summary.answer_rate:.1f} answers and "
        f"{row.summary.goodput:.1f} good ones per second"
        for row in rows
    )
    return Chart("Stages", description, figure)


def _rounds(results: Results) -> Chart:
    rows = results.totals()
    goodput = results.scenario.turns == "policies"
    turns = list(dict.fromkeys(row.phase.turn for row in rows))
    label = "good requests per second" if goodput else "tokens per second"

    def value(index: int) -> float:
        summary = rows[index].summary
        return summary.goodput if goodput else summary.throughput

    figure, axes = _axes()
    for number, turn in enumerate(turns):
        of_turn = [index for index, row in enumerate(rows) if row.phase.turn == turn]
        rounds = [rows[index].phase.round + 1 for index in of_turn]
        colour = SERIES[number % len(SERIES)]
        axes.plot(rounds, [value(index) for index in of_turn], "o", color=colour, label=turn)
    axes.set(xlabel="round", ylabel=label, ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend()
    description = "; ".join(
        f"{turn}: "
        + ", ".join(f"{value(i):.1f}" for i, row in enumerate(rows) if row.phase.turn == turn)
        for turn in turns
    )
    return Chart(f"Turns, {label}", description, figure)


def _memory(results: Results) -> Chart:
    memory = results.memory
    assert memory is not None
    seconds = np.array(memory.times) - memory.times[0]
    figure, axes = _axes()
    axes.plot(seconds, memory.values, color=SERIES[0])
    axes.set(xlabel="seconds", ylabel="resident MB")
    description = f"from {memory.values[0]:.0f} to {memory.values[-1]:.0f} MB"
    return Chart("Memory of the server's processes", description, figure)
