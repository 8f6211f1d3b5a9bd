"""Row numbers of a table that keeps equal entries once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_ROW = 0


class RowTable(Generic[Key]):
    """Rows by key, with reference counts.

    A batch holds many tokens and few distinct masks or expert policies, so a token carries the
    number of a row. The arrays behind the rows are the caller's. `FIRST_ROW` is never freed.
    """

    def __init__(self, first: Key) -> None:
        """A table of one row, whose key is `first`."""
        self._row_of: dict[Key, int] = {first: FIRST_ROW}
        self._keys = [first]
        self._users = [1]

    def acquire(self, key: Key) -> tuple[int, bool]:
        """Count one more user of a key.

        Returns:
            The key's row, and whether the caller must write the entry: no user had this key. A row
            one past the caller's last asks for a longer array.
        """
        row = self._row_of.get(key)
        is_new = row is None
        if row is None:
            row = next((r for r, users in enumerate(self._users) if not users), len(self._users))
            if row == len(self._users):
                self._users.append(0)
                self._keys.append(key)
            self._row_of[key], self._keys[row] = row, key
        self._users[row] += 1
        return row, is_new

    def release(self, row: int) -> bool:
        """Count one user less; True if that was the last and the row may get another key."""
        self._users[row] -= 1
        if self._users[row]:
            return False
        del self._row_of[self._keys[row]]
        return True
