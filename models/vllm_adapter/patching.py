"""Replacing a function of vLLM by one that calls it: once, and with an error if it is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class SeamMovedError(RuntimeError):
    """vLLM no longer has a part that Sluice calls; names the part and the vLLM version."""

    def __init__(self, what: str) -> None:
        import vllm

        super().__init__(
            f"vLLM {vllm.__version__} has no {what}: Sluice was written against 0.32.0 and its "
            "seam has moved; use the pinned version."
        )


_WRAPPED = "_sluice_wrapped"


def wrap_once(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function or method by one that calls it; a second call changes nothing.

    Args:
        owner: module or class of vLLM.
        name: attribute.
        make: from vLLM's function to ours.

    Raises:
        SeamMovedError: the attribute is not where 0.32.0 has it.
    """
    stock = getattr(owner, name, None)
    if stock is None:
        raise SeamMovedError(f"`{name}` on {owner.__name__}")
    if not hasattr(stock, _WRAPPED):
        wrapped = functools.wraps(stock)(make(stock))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)
