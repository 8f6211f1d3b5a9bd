"""Evenly spread places."""

from __future__ import annotations


def evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places, ascending, each in the middle of its share; all if there are less.

    With `count` a half of `total` it is every other place, from the second on.
    """
    if count >= total:
        return tuple(range(total))
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))
