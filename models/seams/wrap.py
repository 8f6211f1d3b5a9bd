"""How seams stand before a function of vLLM: once, and loudly if it is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sluice.models.seams.moved import SeamMovedError

_WRAPPED = "_sluice_wrapped"


def wrap_once(owner: Any, name: str, around: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function or method by one that knows it; a second call changes nothing.

    Args:
        owner: module or class.
        name: attribute.
        around: from vLLM's function to ours.

    Raises:
        SeamMovedError: the attribute is not where 0.32.0 has it.
    """
    stock = getattr(owner, name, None)
    if stock is None:
        raise SeamMovedError(f"`{name}` on {owner.__name__}")
    if not hasattr(stock, _WRAPPED):
        wrapped = functools.wraps(stock)(around(stock))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)
