"""Controls as `/v1/routing/capabilities` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sluice.models.depth.method import Parameter


def listed(
    parameters: dict[str, Any], source: str, reason: str | None = None, **more: Any
) -> dict[str, Any]:
    """A control: what it takes, the paper it is from, and why it is not available, or None."""
    return {
        "parameters": parameters,
        "source": source,
        "available": reason is None,
        "reason": reason,
        **more,
    }


def numbers(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Ranges and defaults by name."""
    return {name: number(p.low, p.high, p.default) for name, p in parameters.items()}


def number(low: float, high: float, default: Any) -> dict[str, Any]:
    """Range and default of one number."""
    return {"low": low, "high": high, "default": default}


def choice(values: Sequence[Any], default: Any) -> dict[str, Any]:
    """What a field may be, and what it is if it is not given."""
    return {"choices": [*values], "default": default}
