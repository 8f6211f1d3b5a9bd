from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sluice.models.policy.row_table import FIRST_ROW, RowTable

KEYS = "abcd"


def test_equal_keys_share_a_row_until_the_last_user_leaves() -> None:
    table = RowTable("a")
    assert table.acquire("a") == (FIRST_ROW, False)
    assert table.acquire("b") == (1, True)
    assert table.acquire("b") == (1, False)
    assert not table.release(1)
    assert table.release(1)
    assert table.acquire("c") == (1, True)
    assert table.acquire("b") == (2, True)


def test_the_first_row_is_never_freed() -> None:
    table = RowTable("a")
    table.acquire("a")
    assert not table.release(FIRST_ROW)
    assert table.acquire("b") == (1, True)
    assert table.acquire("a") == (FIRST_ROW, False)


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.booleans())))
def test_live_keys_have_rows_of_their_own(steps: list[tuple[str, bool]]) -> None:
    """Any order of acquires and releases, against a plain count of users by key."""
    table, users, rows = RowTable("first"), Counter[str](), {"first": FIRST_ROW}
    for key, leaves in steps:
        if leaves and users[key]:
            users[key] -= 1
            assert table.release(rows[key]) == (users[key] == 0)
            if not users[key]:
                del rows[key]
        elif not leaves:
            row, is_new = table.acquire(key)
            assert is_new == (users[key] == 0)
            assert rows.setdefault(key, row) == row
            users[key] += 1
        assert len({*rows.values()}) == len(rows)
