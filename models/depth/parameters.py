"""What a method or control takes: numbers, choices, flags, shares per layer.

A parameter's name is a field of the request (`sluice.models.routing.schema`), so that one name has
one kind, whatever method takes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Number:
    """A number.

    Attributes:
        low: smallest value, inclusive.
        high: largest value, inclusive.
        default: used where the request names none; None if it must.
        integer: only whole numbers.
        optional: may be left out; the method checks what is missing (`DepthMethod.check`).
    """

    low: float
    high: float
    default: float | None = None
    integer: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words.

    Attributes:
        values: what it may be.
        default: used where the request names none.
    """

    values: tuple[str, ...]
    default: str


@dataclass(frozen=True, slots=True)
class Flag:
    """On or off, off by default.

    Attributes:
        needs_whole_prompt: can be on only where the scheduler runs prompts in one step.
    """

    needs_whole_prompt: bool = False


@dataclass(frozen=True, slots=True)
class LayerShares:
    """A share in (0, 1] for each layer; the method has a default (`DepthMethod.default_shares`)."""


Parameter = Number | Choice | Flag | LayerShares
