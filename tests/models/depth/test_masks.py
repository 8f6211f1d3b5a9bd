from __future__ import annotations

from sluice.models.depth.masks import FULL_DEPTH, DepthMask, MaskTable, phase_masks
from sluice.models.policy.policy import SkipSet


def test_table_shares_rows_and_reuses_them() -> None:
    table = MaskTable(8)
    first, second, third = (phase_masks(SkipSet.of(mlp=(layer,)), 8)[0] for layer in (1, 2, 3))
    assert table.acquire(DepthMask.full(8)) == FULL_DEPTH
    row = table.acquire(first)
    assert table.acquire(first) == row
    assert table.acquire(second) != row
    assert not table.release(row)
    assert table.acquire(first) == row
    assert not table.release(row)
    assert table.release(row)
    assert not table.release(FULL_DEPTH)
    assert table.acquire(third) == row
    assert table.mask(row).key == third.key
    assert table.skip[row].tolist() == third.skip.tolist()
    assert len(table.skip) == len(table.fill) == 3
