"""`--policy` of the commands that measure: the policies to compare, by name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.routing.presets import NO_PRESET

if TYPE_CHECKING:
    from sluice.models.offline.evaluate.results import PolicyResult


Policies = dict[str, Mapping[str, Any]]
"""`routing` objects by name, in order."""


def add_policy_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add `--policy`; `more` ends its help text."""
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        help="policy to measure: a preset's name, `none` for full depth, a routing object as JSON, "
        "or @FILE with a JSON object of names and routing objects; may be given several "
        f"times{more}",
    )


def read_policies(texts: list[str]) -> Policies:
    """`--policy` arguments as routing objects by name, in order.

    Raises:
        ValueError: not JSON, not an object, or a name was given twice.
    """
    policies: Policies = {}
    for text in texts:
        for name, routing in _read_policy(text).items():
            if not isinstance(routing, dict):
                raise ValueError(f"--policy {text}: {name} is not a routing object")
            if name in policies:
                raise ValueError(f"--policy {text}: {name} was given before")
            policies[name] = routing
    return policies


def _read_policy(text: str) -> dict[str, Any]:
    if text == NO_PRESET:
        return {NO_PRESET: {}}
    if text.startswith("{"):
        return {text: _json(text, text)}
    if not text.startswith("@"):
        return {text: {"preset": text}}
    try:
        content = Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--policy {text}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--policy {text}: not UTF-8: {error}") from None
    named = _json(text, content)
    if not isinstance(named, dict):
        raise ValueError(f"--policy {text}: not a JSON object of names and routing objects")
    if not named:
        raise ValueError(f"--policy {text}: no policies")
    return named


def _json(argument: str, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"--policy {argument}: not JSON: {error}") from None


Measure = Callable[[str, Mapping[str, Any]], "PolicyResult"]
"""Name and `routing` object of a policy to its result; raises `EvaluationError`."""


def measure_all(
    policies: Mapping[str, Mapping[str, Any]], measure: Measure
) -> tuple[list[PolicyResult], str | None]:
    """Measure policies until one fails.

    Returns:
        The results, and why the first policy without one failed, or None if all were measured.
    """
    from sluice.models.offline.evaluate.evaluation import EvaluationError, PolicyRefusedError

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
    """Print the tables, and the warnings on standard error."""
    from rich.console import Console

    from sluice.models.offline.evaluate.results import show

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
