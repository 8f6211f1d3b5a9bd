"""The table of kernel times: its arithmetic, what it says, and a small run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sluice.kernels.bench import machine as machines
from sluice.kernels.bench.__main__ import main, notes
from sluice.kernels.bench.cases.case import Call, nbytes
from sluice.kernels.bench.cases.catalogue import OPERATIONS
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.bench.clock import CpuClock, Sample, interleaved
from sluice.kernels.bench.machine import Machine
from sluice.kernels.bench.measure import OURS, REFERENCE, Result
from sluice.kernels.bench.report import cells, record
from sluice.kernels.dispatch import Operation

TINY = replace(Shapes.for_device("cpu"), rows=(1, 5), vocabulary=61, hidden=24, head_size=8)
BY_NAME = {entry.name: entry for entry in OPERATIONS}


class StillClock:
    """Every call takes 1 ms, whatever it does."""

    def calls(self, call: Call) -> int:
        return 1

    def seconds(self, call: Call, calls: int) -> float:
        call()
        return 1e-3


def measured(**seconds: tuple[float, ...]) -> Result:
    samples = {name: Sample(values) for name, values in seconds.items()}
    return Result("op, kind", 32, 8_000_000, "module:op", samples, {})


MADE_UP = measured(
    reference=(8e-3, 9e-3, 6e-3),
    ours=(2e-3, 3e-3, 1e-3),
    copy=(1e-3, 1e-3, 1e-3),
    stock=(1e-3, 1.5e-3, 1e-3),
)


def test_median_and_spread() -> None:
    sample = Sample((5.0, 1.0, 2.0, 4.0, 3.0, 11.0, 7.0, 8.0, 9.0, 10.0, 6.0))
    assert sample.median == 6.0
    assert sample.spread == pytest.approx((2.0, 10.0))
    assert Sample((1.0, 3.0)).median == 2.0


def test_ratios_are_those_of_each_repeat() -> None:
    """One slow moment falls on both of a pair: 10 over 5 is as much as 2 over 1."""
    ratio = Sample((2.0, 10.0, 4.0)).over(Sample((1.0, 5.0, 4.0)))
    assert ratio.values == (2.0, 2.0, 1.0)
    assert ratio.median == 2.0


def test_bandwidth_share_and_gain() -> None:
    assert MADE_UP.bandwidth == pytest.approx(8e6 / 2e-3)
    assert MADE_UP.share(16e9) == pytest.approx(0.25)
    assert MADE_UP.counterparts == ("stock",)
    gains = [MADE_UP.gain(name) for name in (REFERENCE, "stock")]
    assert [gain and gain.median for gain in gains] == pytest.approx([4.0, 0.5])


def test_where_the_reference_is_what_runs() -> None:
    alone = measured(reference=(8e-3, 9e-3, 7e-3), copy=(1e-3, 1e-3, 1e-3))
    assert alone.ours == alone.seconds[REFERENCE]
    assert alone.bandwidth == pytest.approx(1e9)
    assert "is ours" in cells(alone, 1e9)


def test_the_table_says_what_was_measured() -> None:
    line = cells(MADE_UP, 16e9)
    assert line[0] == "op, kind"
    assert line[1:6] == ("32", "2000.0 (1200.0-2800.0)", "8.000", "4.00", "25.0%")
    assert line[6] == "1000.0"
    assert line[7].startswith("4.00 (")
    assert line[8].startswith("0.50 (")
    assert line[8].endswith(" stock")


def test_the_table_has_no_figures_of_what_is_wrong() -> None:
    broken = replace(MADE_UP, wrong={OURS: "weights: NaN"})
    assert broken.ours is broken.bandwidth is broken.share(1e9) is broken.gain("stock") is None
    line = cells(broken, 16e9)
    assert line[2] == line[4] == line[5] == line[7] == ""
    assert "WRONG, ours: weights: NaN" in line[8]


def test_the_record_holds_every_time() -> None:
    machine = Machine("a processor", "cpu", 2, 0.5, {"torch": "2", "vllm": None}, 16e9)
    assert machine.setting == "a processor, 2 threads, load 0.5 before; torch 2; copy 16 GB/s"
    found = record([MADE_UP], machine, ["a note"])
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))
    assert found["machine"]["versions"] == {"torch": "2", "vllm": None}
    assert found["notes"] == ["a note"]
    (row,) = found["rows"]
    assert row["share_of_copy"] == pytest.approx(0.25)
    assert row["timed"]["stock"]["seconds"] == (1e-3, 1.5e-3, 1e-3)
    assert row["timed"]["stock"]["over_ours"] == pytest.approx(0.5)


def test_bytes_of_tensors_and_groups() -> None:
    half = torch.empty(3, 5, dtype=torch.bfloat16)
    assert nbytes(half) == 30
    assert nbytes(half, [half, torch.empty(2, dtype=torch.int64)], []) == 76
    assert nbytes(torch.empty(0, 7)) == 0


POLICY = 3 * 4 + 2 * 4 + 128 * (4 + 1 + 4)
"""One policy of 128 experts."""
HISTOGRAM = 130 * 8
MOVED = {
    "route_topk, neutral": 5 * (512 + 4) + POLICY + 2 * HISTOGRAM + 5 * 8 * 8,
    "route_topk, policies": 5 * (512 + 4 + 8 + 48) + 9 * POLICY + 2 * HISTOGRAM + 5 * 16 * 8,
    "router_scores": 5 * (512 + 4 + 1024) + 9 * 128 * 5,
    "batch_budget, OEA": 5 * 512 + 128,
    "batch_budget, Lynx": 2 * 5 * 512 + 128,
    "count_selections": 5 * (8 * 4 + 8 + 48) + 2 * HISTOGRAM,
    "layer_stats": 5 * (3 * 24 * 4 + 12),
    "exit_decision, confidence": 5 * (61 * 4 + 4 + 17),
    "row_compact": 5 * (8 + 4 * 24 * 4),
    "row_scatter": 5 * (8 + 4 * 24 * 4),
    "contrast_logits": 5 * (3 * 61 * 4 + 8),
    "kv_fill": 5 * (2 * 8 + 8 * 4 + 4 * 4 * 8 * 4) + 8 * 4,
}
"""Bytes at 5 rows of `TINY`: each input once, each output once; counts are read and written."""


@pytest.mark.parametrize("name", BY_NAME)
def test_what_each_operation_moves(name: str) -> None:
    moved = {case.name: case.moved for case in BY_NAME[name].cases(TINY, 5)}
    for own in MOVED:
        if own.partition(",")[0] == name:
            assert moved[own] == MOVED[own]


def test_calls_take_turns() -> None:
    seen: list[str] = []
    clock = StillClock()
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleaved(calls, 4, clock)
    assert "".join(seen[-12:]) == "abccbaabccba"
    assert set(seen[:-12]) == {*"abc"}, "all are warm"
    assert times == {name: [1e-3] * 4 for name in "abc"}


def test_short_calls_are_timed_in_a_row() -> None:
    clock = CpuClock()
    called = 0

    def short() -> None:
        nonlocal called
        called += 1

    assert clock.calls(short) > 100
    called = 0
    assert 0.0 < clock.seconds(short, 200) < 1e-3
    assert called == 200
    long = torch.ones(2**25)
    assert clock.calls(lambda: long.clone().sin().cos()) == 1


def test_sizes_that_are_left_out_are_named() -> None:
    shapes = replace(Shapes.for_device("cpu"), rows=(1, 8, 32), most_bytes=2**20, vocabulary=20_000)
    assert shapes.sweep(20_000, None) == (1, 8)
    assert shapes.sweep(20_000, 7) == (1,)
    assert shapes.left_out(20_000, None) == (32,)
    assert shapes.left_out(20_000, 8) == ()
    found = notes([BY_NAME["exit_decision"], BY_NAME["layer_stats"]], shapes, None)
    assert [note for note in found if "not with" in note] == [
        "exit_decision: not with 32 rows, an input of more than 1 MiB."
    ]


def test_a_cpu_says_why_triton_is_not_there() -> None:
    assert any("Triton is not timed on a CPU" in note for note in notes([], TINY, None))


@pytest.fixture
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machines._COPY_BYTES, "cpu", 2**20)


def run(out: Path, *ops: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--device", "cpu", "--repeats", "5", "--max-rows", "8"]
    status = main([*arguments, "--out", str(out), "--ops", *ops])
    return status, json.loads((out / "kernels.json").read_text())


@pytest.mark.usefixtures("small_copy")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path / "new", "row_compact", "batch_budget")
    assert status == 0
    kinds = [f"batch_budget, {method}" for method in ("OEA", "XShare", "Lynx")]
    sizes = [(row["name"], row["rows"]) for row in found["rows"]]
    assert sizes == [(name, rows) for name in (*kinds, "row_compact") for rows in (1, 8)]
    for row in found["rows"]:
        ours = row["timed"].get(OURS, row["timed"][REFERENCE])
        assert ours["median"] > 0.0
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / ours["median"])
        bandwidth = found["machine"]["copy_bandwidth"]
        assert row["share_of_copy"] == pytest.approx(row["bytes_per_second"] / bandwidth)
        assert {len(own["seconds"]) for own in row["timed"].values()} == {5}
        assert row["wrong"] == {}
    machine = found["machine"]
    assert machine["device"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["torch"] == torch.__version__
    assert {"triton", "vllm"} <= machine["versions"].keys()
    assert (tmp_path / "new" / "kernels.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "row_compact" in printed
    assert "Triton is not timed" in printed


@pytest.mark.usefixtures("small_copy")
def test_a_run_with_something_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Operation.implementation

    def implementation(self: Any, device: str, choice: str) -> Any:
        if self.name != "row_compact":
            return right(self, device, choice)
        return lambda delta, residual, index: (delta[index + 1], residual[index])

    monkeypatch.setattr(Operation, "implementation", implementation)
    status, found = run(tmp_path, "row_compact", "row_scatter")
    assert status == 1
    by_name = {(row["name"], row["rows"]): row for row in found["rows"]}
    for rows in (1, 8):
        assert "differ" in by_name["row_compact", rows]["wrong"][OURS]
        assert OURS not in by_name["row_compact", rows]["timed"]
        assert by_name["row_compact", rows]["bytes_per_second"] is None
        assert by_name["row_scatter", rows]["wrong"] == {}
    assert "WRONG, ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--repeats", "4"], "--repeats must be at least 5"),
        (["--max-rows", "0"], "--max-rows must be at least 1"),
        (["--ops", "route_top"], "invalid choice: 'route_top'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "no GPU here"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert why in capsys.readouterr().err
