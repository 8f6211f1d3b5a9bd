"""`--policy` of the commands that measure: what to compare, by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sluice.server.presets import NO_PRESET

Policies = dict[str, Mapping[str, Any]]
"""`routing` objects by what to call them, in order."""


def add_policy_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add `--policy`; `more` is said at the end of its help."""
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        help="a preset's name, `none` for full depth, a routing object as JSON, or @FILE with "
        f"JSON of names and routing objects; repeatable{more}",
    )


def read_policies(texts: list[str]) -> Policies:
    """`--policy` arguments as routing objects by name, in order.

    Raises:
        ValueError: no JSON, no object, or a name that came twice.
    """
    policies: Policies = {}
    for text in texts:
        for name, routing in _read_policy(text).items():
            if not isinstance(routing, dict):
                raise ValueError(f"--policy {text}: {name} is no routing object")
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
        raise ValueError(f"--policy {text}: not an object of names and routing objects")
    if not named:
        raise ValueError(f"--policy {text}: no policies")
    return named


def _json(argument: str, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"--policy {argument}: not JSON: {error}") from None
