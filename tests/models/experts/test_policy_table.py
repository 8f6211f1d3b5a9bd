"""The table of live expert policies: shared, reused, and never stale."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sluice.kernels.ops.routing_args import DROPPED, FORCED, PROTECTED
from sluice.models.experts.controls import LayerControls
from sluice.models.experts.policy_table import STOCK_ROW, ExpertTable
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import Contrast, ExpertPolicy

SHAPE = ExpertShape(layers=(0, 2, 3), experts=6, top_k=2)
SUPERS = ((2, 1),)
DEVICE = torch.device("cpu")
POLICIES = (
    ExpertPolicy(masked=((0, 1), (3, 5))),
    ExpertPolicy(masked=((0, 2), (3, 4)), protect=False),
    ExpertPolicy(dropped=((2, 4),)),
    ExpertPolicy(forced=((0, 3, None), (2, 2, 0.5))),
    ExpertPolicy(bias=((3, 0, 0.25),)),
    ExpertPolicy(top_k=1),
    ExpertPolicy(top_k=(4, 1, 2, 3)),
    ExpertPolicy(top_p=0.4),
    ExpertPolicy(skip_ratio=(0.0, 0.0, 0.5, 0.0)),
    ExpertPolicy(contrast=Contrast(1, 0.5, 0.1)),
    ExpertPolicy(contrast=Contrast(2, 0.5, 0.1)),
)


def assert_controls(table: ExpertTable, held: list[tuple[int, ExpertPolicy, bool]]) -> None:
    """Rows give the controls of the policies that hold them, side by side and alone."""
    stock = LayerControls.from_policy(ExpertPolicy(), SHAPE, ())
    wanted = [
        stock,
        *(LayerControls.from_policy(p, SHAPE, SUPERS, weak=weak) for _, p, weak in held),
    ]
    rows = np.array([STOCK_ROW, *(row for row, _, _ in held)], dtype=np.int64)
    widths = table.widths(rows)
    for moe_index in range(len(SHAPE.layers)):
        layer = table.layer(moe_index)
        for row, own in zip(rows.tolist(), wanted, strict=True):
            says = own.bias[moe_index].any() or own.dropped[moe_index].any()
            says |= own.forced[moe_index].any() or own.protected[moe_index].any()
            assert layer.limits[row].tolist() == [own.k[moe_index], own.weak_rank, says]
            assert layer.cuts[row].tolist() == [own.ratio[moe_index], own.top_p[moe_index]]
            assert layer.bias[row].tolist() == own.bias[moe_index].tolist()
            for bit, name in ((DROPPED, "dropped"), (FORCED, "forced"), (PROTECTED, "protected")):
                found = (layer.marks[row] & bit) != 0
                assert found.tolist() == getattr(own, name)[moe_index].tolist(), name
            weights = layer.forced_weight[row].numpy()
            np.testing.assert_array_equal(weights, own.forced_weight[moe_index])
            assert table.active[row, moe_index] == own.active[moe_index]
            assert (
                widths[moe_index] >= own.k[moe_index] + own.protected[moe_index].any() * SHAPE.top_k
            )
        assert all(part.is_contiguous() for part in layer.tensors)
    used = max(int(own.k.max()) for own in wanted)
    assert max(widths) <= used + SHAPE.top_k


def test_rows_are_shared_and_reused() -> None:
    table = ExpertTable(SHAPE, SUPERS, DEVICE)
    first = table.acquire(POLICIES[0])
    assert first != STOCK_ROW
    assert table.acquire(POLICIES[0]) == first
    second = table.acquire(POLICIES[1])
    assert second not in (STOCK_ROW, first)
    table.release(first)
    assert table.acquire(POLICIES[0]) == first
    table.release(first)
    table.release(first)
    assert table.acquire(POLICIES[2]) == first
    assert_controls(table, [(first, POLICIES[2], False), (second, POLICIES[1], False)])
    assert len(table.active) == 3
    strong, weak = table.acquire(POLICIES[9]), table.acquire(POLICIES[9], weak=True)
    assert strong != weak
    assert_controls(table, [(strong, POLICIES[9], False), (weak, POLICIES[9], True)])


def test_policies_that_differ_in_protection_alone_do_not_share() -> None:
    table = ExpertTable(SHAPE, SUPERS, DEVICE)
    kept = table.acquire(ExpertPolicy(top_k=1))
    given_up = table.acquire(ExpertPolicy(top_k=1, protect=False))
    assert kept != given_up


class LiveTable(RuleBasedStateMachine):
    """Requests come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ExpertTable(SHAPE, SUPERS, DEVICE)
        self.held: list[tuple[int, ExpertPolicy, bool]] = []

    @rule(policy=st.sampled_from(POLICIES), weak=st.booleans())
    def add(self, policy: ExpertPolicy, weak: bool) -> None:
        weak = weak and policy.contrast is not None
        self.held.append((self.table.acquire(policy, weak=weak), policy, weak))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.held:
            row, *_ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.table.release(row)

    @rule(data=st.data())
    def serve_some(self, data: st.DataObject) -> None:
        """What is asked in part is cached under other rows."""
        if self.held:
            part = data.draw(st.lists(st.sampled_from(self.held), max_size=3))
            assert_controls(self.table, part)

    @invariant()
    def rows_are_their_policies(self) -> None:
        distinct = {(policy, weak) for _, policy, weak in self.held}
        assert len({row for row, _, _ in self.held}) == len(distinct)
        assert len(self.table.active) <= len(POLICIES) + 3
        assert_controls(self.table, self.held)


TestLiveTable = LiveTable.TestCase
TestLiveTable.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
