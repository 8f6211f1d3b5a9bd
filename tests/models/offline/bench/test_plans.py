"""Recorded plans, and what the benchmark's model makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.models.offline.bench.model import LAYERS
from sluice.models.offline.bench.plans import RecordedPlans
from sluice.models.offline.bench.record import _different, _left_out
from sluice.models.policy.policy import Phase

NOTHING = {"attention": [], "mlp": []}
HALF = {"attention": [4, 5, 6, 7], "mlp": [4, 5, 6, 7]}


def plans(tmp_path: Path, **policy: object) -> RecordedPlans:
    path = tmp_path / "plans.json"
    entry = {"tested": [], "exits": [], "skips": [], **policy}
    path.write_text(json.dumps({"layers": 8, "policies": {"it": entry}}))
    return RecordedPlans.load(path)


def test_exits_go_to_the_same_share_of_the_depth(tmp_path: Path) -> None:
    recorded = plans(tmp_path, tested=[1, 3], exits=[1, 3, 7, 3])
    first, second = recorded.policies("it", 2)
    assert first.exit is not None
    assert second.exit is not None
    assert first.exit.layers == (4, 9)
    assert first.exit.numbers("script") == (4, 9, 19, 9)
    assert second.exit.numbers("script") == (19, 9, 4, 9)
    assert first.skip.empty
    assert recorded.ideal("it") == pytest.approx(LAYERS / ((5 + 10 + 20 + 10) / 4))


def test_skips_go_to_the_same_places(tmp_path: Path) -> None:
    lone = {"attention": [0], "mlp": [7]}
    recorded = plans(tmp_path, skips=[HALF, lone])
    first, second, third, _ = recorded.policies("it", 4)
    assert first == second
    assert first.exit is None
    assert first.skip.attention == first.skip.mlp == tuple(range(10, 20))
    assert first.skip.phase is Phase.DECODE
    # 20 layers for 8: the first has the places 0 to 2, the last one 18 and 19.
    assert (third.skip.attention, third.skip.mlp) == ((0, 1, 2), (18, 19))
    assert recorded.ideal("it") == pytest.approx(LAYERS / ((10 + (20 - 2.5)) / 2))


def test_a_layer_behind_the_exit_is_not_left_out_twice(tmp_path: Path) -> None:
    recorded = plans(tmp_path, tested=[3], exits=[3], skips=[{"attention": [3, 7], "mlp": [3, 7]}])
    (policy,) = recorded.policies("it", 1)
    assert policy.exit is not None
    assert policy.skip.mlp == (8, 9, 18, 19)
    assert recorded.ideal("it") == pytest.approx(LAYERS / 8)


def test_what_a_report_says_was_left_out() -> None:
    skip = {"attention": [1], "mlp": [2]}
    for phase, expected in (("decode", skip), ("both", skip), ("prefill", NOTHING)):
        assert _left_out({"policy": {"depth": {"skip": skip, "phase": phase}}}) == expected
    assert _left_out({"policy": {}}) == NOTHING
    assert _left_out({"policy": {}, "mask": [4, 5, 6, 7]}) == HALF
    assert _different([HALF, HALF]) == [HALF]
    assert _different([HALF, NOTHING]) == [HALF, NOTHING]
    assert _different([NOTHING, NOTHING]) == []


def test_the_shipped_recording() -> None:
    shipped = RecordedPlans.load()
    for name in shipped.names:
        assert shipped.ideal(name) > 1
        assert len(shipped.policies(name, 8)) == 8
        assert set(shipped.bars(name)) == {1, 8}
