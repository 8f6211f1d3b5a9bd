"""Subcommands run in the test process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_command(add_parser: Callable[[Any], None], *arguments: str | Path) -> int | str | None:
    """Parse and run `sluice ARGUMENTS` of the one subcommand: its exit status."""
    parser = argparse.ArgumentParser(prog="sluice")
    add_parser(parser.add_subparsers(required=True))
    try:
        args = parser.parse_args([*map(str, arguments)])
        args.run(args)
    except SystemExit as end:
        return end.code
    return 0
