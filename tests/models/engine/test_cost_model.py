"""Which rows a layer runs: invariants for any costs, and the choice that given costs force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.masks import Segment
from sluice.models.engine.cost_model import CostModel
from sluice.models.engine.plan import LayerNeeds, LayerPlan, Rows, StepShape, build_plan
from sluice.models.policy.axes import DECODE

SIZES = 10
ROWS = 8
flags = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array)
columns = st.lists(st.floats(0, 1), min_size=SIZES, max_size=SIZES)


def shape_of(requests: int = ROWS) -> StepShape:
    """Of `ROWS` rows."""
    segments = [Segment(i, DECODE, 0, ROWS // requests) for i in range(requests)]
    one = np.zeros((1, 1, 2), dtype=np.bool_)
    return build_plan(segments, requests, one, one[..., 0]).shape


def costs(**seconds_per_row: float) -> CostModel:
    """Linear costs; what is not named is free."""
    sizes = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], dtype=np.float64)
    names = ("attention", "fill", "mlp", "move")
    return CostModel(*(sizes * seconds_per_row.get(name, 0.0) for name in names))


def plan_of(model: CostModel, shape: StepShape, *needs: Rows) -> LayerPlan:
    """Of one layer between others that run all rows."""
    (plan,) = model.plan_layers(shape, [LayerNeeds(*needs)])
    return plan


@given(st.sampled_from([ROWS, 2]), flags, flags, flags, st.lists(columns, min_size=4, max_size=4))
def test_every_row_gets_its_due(
    requests: int,
    attention: np.ndarray,
    fill: np.ndarray,
    mlp: np.ndarray,
    table: list[list[float]],
) -> None:
    shape = shape_of(requests)
    model = CostModel.from_array(np.maximum.accumulate(np.array(table), axis=1))
    sets = (attention, fill & ~attention, mlp)
    plan = plan_of(model, shape, *(shape.rows(chosen) for chosen in sets))
    ran = shape.chosen(plan.attend.rows)
    kept = ran.copy()
    kept[plan.attend.rows.tokens[plan.attend.dropped]] = False
    filled = shape.chosen(plan.separate_fill)
    assert (kept == attention).all()
    written = shape.chosen(plan.writes)
    assert not (filled & written).any()
    assert not (written & ~ran).any()
    assert ((filled | (written & ~kept)) == sets[1]).all()
    assert (written[attention]).all()
    if requests < ROWS:
        assert (ran == written).all(), "who has neighbours of its own request stays out"
    ran = shape.chosen(plan.run_mlp.rows)
    ran[plan.run_mlp.rows.tokens[plan.run_mlp.dropped]] = False
    assert (ran == mlp).all()


@pytest.mark.parametrize(
    ("model", "attend", "fill", "mlp"),
    [
        # Copies cost nothing: each module runs its own rows.
        (costs(attention=1.0, fill=0.1, mlp=1.0), 5, 3, 5),
        # Filling on its own reads as much as attending: they go together.
        (costs(attention=1.0, fill=1.1, mlp=1.0), 8, 0, 5),
        # Copies cost more than a module saves: nobody is taken out.
        (costs(attention=1.0, fill=1.1, mlp=1.0, move=9.0), 8, 0, 8),
    ],
)
def test_costs_decide(model: CostModel, attend: int, fill: int, mlp: int) -> None:
    shape = shape_of()
    staying = np.arange(ROWS) < 5
    rows = [shape.rows(chosen) for chosen in (staying, ~staying, staying)]
    plan = plan_of(model, shape, *rows)
    chosen = (len(plan.attend.rows), len(plan.separate_fill), len(plan.run_mlp.rows))
    assert chosen == (attend, fill, mlp)


def test_a_row_that_skips_stays_where_copies_cost_more_and_writes_nothing() -> None:
    shape = shape_of()
    staying = shape.rows(np.arange(ROWS) < 5)
    model = costs(attention=1.0, mlp=1.0, move=9.0)
    plan = plan_of(model, shape, staying, shape.nothing, staying)
    assert plan.attend.rows is plan.run_mlp.rows is shape.everything
    assert plan.writes is staying
    assert plan.attend.dropped.tolist() == [5, 6, 7]


def test_a_layer_that_nobody_needs_is_not_launched() -> None:
    shape = shape_of()
    plan = plan_of(costs(move=1.0), shape, shape.nothing, shape.nothing, shape.nothing)
    assert len(plan.attend.rows) == len(plan.separate_fill) == len(plan.run_mlp.rows) == 0


def test_when_all_rows_have_left_only_their_fill_remains() -> None:
    shape = shape_of()
    plan = plan_of(costs(fill=5.0), shape, shape.nothing, shape.everything, shape.nothing)
    assert plan.separate_fill is shape.everything
    assert len(plan.attend.rows) == len(plan.run_mlp.rows) == 0
