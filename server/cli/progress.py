"""Progress of a long command: bars in a terminal, plain lines where its output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 15.0
"""Seconds between two lines at least."""


class Progress:
    """What a command is doing, how far it is, and how long that will take."""

    def __init__(self, console: Console) -> None:
        """Show it on a console, once entered."""
        self._console = console
        self._bars: Any = _bars(console) if console.is_terminal else None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def track(self, things: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        """Hand things on, and show how many are done.

        Args:
            things: to hand on.
            description: what is done with them.
            total: how many there are; 0 if nobody knows.
        """
        return (self._lines if self._bars is None else self._bar)(things, description, total)

    def _bar(self, things: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        task = self._bars.add_task(description, total=total or None)
        try:
            for thing in things:
                yield thing
                self._bars.advance(task)
        finally:  # A step may have seen enough before the end.
            self._bars.update(task, visible=False)

    def _lines(self, things: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        began = said = time.monotonic()
        for done, thing in enumerate(things, 1):
            yield thing
            now = time.monotonic()
            if now - said >= _EVERY and done != total:
                said = now
                self._say(progress_line(description, done, total, now - began))
        taken = time.monotonic() - began
        if taken >= _EVERY:
            self._say(f"  {description}: done in {taken:.0f} s")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_line(description: str, done: int, total: int, seconds: float) -> str:
    """How far something is.

    Args:
        description: what is done.
        done: how many things are.
        total: of how many; 0 if nobody knows.
        seconds: that it took so far.
    """
    if not total or done > total:
        return f"  {description}: {done} in {seconds:.0f} s"
    left = seconds / done * (total - done)
    return f"  {description}: {done} of {total}, about {left:.0f} s left"


def _bars(console: Console) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
