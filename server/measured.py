"""What the commands that measure policies have in common: one policy after the other, shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluice.models.evaluate.results import PolicyResult

Measure = Callable[[str, Mapping[str, Any]], "PolicyResult"]
"""Name and `routing` object of a policy to its result; raises `EvaluationError`."""


def measure_all(
    policies: Mapping[str, Mapping[str, Any]], measure: Measure
) -> tuple[list[PolicyResult], str | None]:
    """Measure policies until one cannot be.

    Returns:
        Results, and what is wrong with the policy that has none, if there is one.
    """
    from sluice.models.evaluate.reply import EvaluationError, PolicyRefusedError

    results: list[PolicyResult] = []
    for name, routing in policies.items():
        try:
            results.append(measure(name, routing))
        except PolicyRefusedError as error:
            return results, f"policy {name}: {error}"
        except EvaluationError as error:
            return results, str(error)
    return results, None


def print_results(results: list[PolicyResult], title: str, bar: float | None = None) -> None:
    """Print the tables, and on standard error what the reader has to know."""
    from rich.console import Console

    from sluice.models.evaluate.results import show

    if results:
        show(results, Console(), title, bar)
    for result in results:
        for warning in result.warnings:
            print(f"warning: policy {result.policy}: {warning}", file=sys.stderr)


def write_rows(results: list[PolicyResult], path: Path) -> None:
    """Write a row per policy as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [result.to_wire() for result in results]
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
