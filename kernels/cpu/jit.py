"""How the CPU's operations become machine code: by numba, at first use, kept beside the source."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import ffi

Array = Any
"""A contiguous numpy array: numba infers dtypes from what comes in and reads no annotations."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over arrays; it runs without Python's lock."""
    return _compile(function)


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and what the loop itself adds up may be added in any order.

    Only so does a sum become vector code. The order depends on the number of terms alone.
    """
    return _compile(function, fastmath={"reassoc"})


def _compile(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    # Inlined: a call counts references to each of its arrays, which costs more than a short loop.
    made = numba.njit(cache=True, nogil=True, forceinline=True, **settings)(function)
    # numba looks at a function's own file only, and would keep old code of what that calls.
    made._cache._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
    compiled_function: Callable[..., Any] = made
    return compiled_function


@cache
def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the modules there, and of `ops` beside it with their constants."""
    sources = sorted([*folder.glob("*.py"), *(folder.parent / "ops").glob("*.py")])
    states = [(source.name, source.stat()) for source in sources]
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


# vLLM 0.32, when a CPU worker starts, reads `__dict__` of whatever any loaded module holds.
# llvmlite answers such a question about its library with a C function, and that worker dies.
ffi.lib._fntab["__dict__"] = {}
