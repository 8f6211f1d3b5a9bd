"""How the CPU's operations become machine code: by numba, at first use, kept beside the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite.binding import ffi

Array = Any
"""A contiguous numpy array: numba infers dtypes from what comes in and reads no annotations."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over arrays; it runs without Python's lock."""
    made: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return made


# vLLM 0.32, when a CPU worker starts, reads `__dict__` of whatever any loaded module holds.
# llvmlite answers such a question about its library with a C function, and that worker dies.
ffi.lib._fntab["__dict__"] = {}
