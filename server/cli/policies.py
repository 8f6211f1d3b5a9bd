"""`--policy` of the commands that measure: read the policies, measure each, report the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.routing.presets import NO_PRESET

if TYPE_CHECKING:
    from sluice.models.offline.evaluate.results import PolicyResult

Policies = dict[str, Mapping[str, Any]]
"""`routing` objects by name, in order."""
Measure = Callable[[str, Mapping[str, Any]], "PolicyResult"]
"""Name and `routing` object of a policy to its result; raises `EvaluationError`."""


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


def measure_all(policies: Policies, measure: Measure) -> tuple[list[PolicyResult], str | None]:
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


def report_results(
    args: argparse.Namespace,
    results: Sequence[PolicyResult],
    failure: str | None,
    title: str,
    bar: float | None = None,
) -> None:
    """Print tables and warnings, and write a row per policy as JSON to the file of `--json`.

    Raises:
        SystemExit: 2 if the file cannot be written, or if a policy could not be measured: what
            was measured before it is shown.
    """
    from rich.console import Console

    from sluice.models.offline.evaluate.paired import differences
    from sluice.models.offline.evaluate.tables import show

    if results:
        show(results, Console(), title, bar)
    for result in results:
        for warning in result.warnings:
            print(f"warning: policy {result.policy}: {warning}", file=sys.stderr)
    if args.json is not None:
        rows = [result.to_wire() for result in results]
        for row, difference in zip(rows[1:], differences(results), strict=True):
            row["difference"] = difference.to_wire()
        try:
            args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            args.parser.error(f"{args.json}: {error.strerror}")
    if failure is not None:
        args.parser.error(failure)
