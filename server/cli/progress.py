"""Progress of a long command: bars in a terminal, plain lines where its output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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
        with self.count(description, total) as done:
            for thing in things:
                yield thing
                done()

    @contextmanager
    def count(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Show how many of something are done; gives what counts one more.

        Args:
            description: what is done.
            total: how many there are; 0 if nobody knows.
        """
        if self._bars is None:
            lines = _Lines(self._say, description, total)
            yield lines.advance
            lines.end()
            return
        task = self._bars.add_task(description, total=total or None)
        try:
            yield lambda: self._bars.advance(task)
        finally:  # A step may have seen enough before the end.
            self._bars.update(task, visible=False)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """Says in plain lines how many of something are done."""

    def __init__(self, say: Callable[[str], None], description: str, total: int) -> None:
        self._say = say
        self._description = description
        self._total = total
        self._done = 0
        self._began = self._said = time.monotonic()

    def advance(self) -> None:
        """One more."""
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _EVERY and self._done != self._total:
            self._said = now
            line = progress_line(self._description, self._done, self._total, now - self._began)
            self._say(line)

    def end(self) -> None:
        """That was all."""
        taken = time.monotonic() - self._began
        if taken >= _EVERY:
            self._say(f"  {self._description}: done in {taken:.0f} s")


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
