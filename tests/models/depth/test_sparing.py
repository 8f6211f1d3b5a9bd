"""Exit tests while they pay, told from a request's own tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sluice.models.depth.sparing import PAUSE, WINDOW, ExitHistory

LAYERS = (1, 3)
WORTH = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.0])
LAST = len(WORTH) - 1


def history(*left_after: int | None) -> ExitHistory:
    past = ExitHistory(LAYERS, WORTH)
    for each in left_after:
        past.note(each)
    return past


def test_the_first_tokens_are_tested() -> None:
    for tokens in range(WINDOW):
        assert history(*[LAST] * tokens).tests_next
    assert not history(*[LAST] * WINDOW).tests_next


@pytest.mark.parametrize(
    ("left_after", "pays"),
    [
        # One that leaves after layer 1 saves 3 heads for 1; one that stays pays for 2.
        ((1, LAST, LAST, LAST), False),
        ((1, 1, LAST, LAST), True),
        ((1, 1, 1, LAST), True),
        # After layer 3 it saves 1 for 2.
        ((3, 3, 3, 3), False),
        ((3, 3, 1, 3), False),
        ((3, 1, 1, 3), True),
    ],
)
def test_what_was_left_out_is_held_against_the_tests(
    left_after: tuple[int, ...], pays: bool
) -> None:
    assert history(*left_after).tests_next is pays
    assert history(LAST, LAST, LAST, *left_after).tests_next is pays


def test_a_break_ends() -> None:
    past = history(*[LAST] * WINDOW)
    for _ in range(PAUSE - 1):
        assert not past.tests_next
        past.note(None)
    assert past.tests_next
    past.note(LAST)
    assert not past.tests_next


def test_tests_come_back_where_they_pay_again() -> None:
    past = history(1, LAST, LAST, LAST, *[None] * (PAUSE - 1))
    assert past.tests_next
    past.note(1)
    assert not past.tests_next
    for _ in range(2):
        for _ in range(PAUSE - 1):
            past.note(None)
        past.note(1)
    assert past.tests_next


def test_tokens_that_are_decided_again() -> None:
    past = history(*[LAST] * WINDOW)
    past.undo(1)
    assert past.tests_next
    past.note(LAST)
    assert not past.tests_next
    past.undo(0)
    assert not past.tests_next
