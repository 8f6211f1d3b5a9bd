"""What is nearly free, found in few tries."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.skip_order import Unit
from sluice.models.offline.calibrate.frontier.nearly_free import Family, families, nearly_free
from sluice.models.offline.calibrate.frontier.settings import Setting

ALLOWED = {"quality": 0.02, "balanced": 0.05, "fast": 0.1}


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=40))
def test_the_most_that_each_preset_allows(losses: list[float]) -> None:
    losses = sorted(losses)
    family = Family("some", tuple(Setting(str(n), {}) for n in range(len(losses))))
    asked = []

    def keeps(preset: str, setting: Setting) -> bool:
        asked.append(setting.name)
        return losses[int(setting.name)] <= ALLOWED[preset]

    found = [int(setting.name) for setting in nearly_free(family, keeps, [*ALLOWED])]
    want = {0} | {
        max(n for n, loss in enumerate(losses) if loss <= most)
        for most in ALLOWED.values()
        if losses[0] <= most
    }
    assert found == sorted(want)
    assert len(asked) <= 3 * (1 + math.ceil(math.log2(len(losses) + 1)))


def test_families_begin_with_one_unit_and_the_latest_exit() -> None:
    importance = {
        "block": [0.9, 0.1, 0.5, 0.4],
        "attention": [0.9, 0.3, 0.2, 0.1],
        "mlp": [0.1, 0.2, 0.3, 0.4],
    }
    chain = [(Unit.BLOCK, 2), (Unit.BLOCK, 1)]
    found = {f.name: f.settings for f in families({"importance": importance}, chain, 4, 3)}
    assert [*found] == ["level", "attention", "mlp", "block", "exit at 0.99", "exit at 0.9"]
    skips = [each.routing["depth"]["skip"] for each in found["level"]]
    assert skips == [{"blocks": [2]}, {"blocks": [1, 2]}]
    assert found["attention"][0].routing["depth"]["skip"] == {"attention": [3], "mlp": []}
    assert found["mlp"][2].routing["depth"]["skip"] == {"attention": [], "mlp": [0, 1, 2]}
    exits = [each.routing["depth"]["exit"]["layers"] for each in found["exit at 0.9"]]
    assert exits == [[2], [1], [0]]
    assert {"attention", "mlp", "block"}.isdisjoint(f.name for f in families({}, chain, 4, 3))


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_few_layers(layers: int) -> None:
    assert [f.name for f in families({}, [], layers, 0)] == []
    exits = [f for f in families({}, [], layers, 1) if f.name.startswith("exit")]
    assert len(exits) == (0 if layers == 1 else 2)
