"""`sluice keys hash`: the hash of an API key, for the file of `sluice serve --keys`."""

from __future__ import annotations

import argparse
import getpass
import secrets
import sys
from typing import Any

from sluice.server.access.keys import KEY, digest_of

_NEW_KEY_BYTES = 32


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `hash` to the parser of `sluice keys`."""
    parser = commands.add_parser(
        "hash",
        help="print the hash of a key for the keys file",
        description="Reads a key from standard input, or makes one with --new, and prints its "
        "`sha256` line for the keys file.",
    )
    parser.add_argument(
        "--new", action="store_true", help="make a random key, and print it as well"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.new:
        key = secrets.token_urlsafe(_NEW_KEY_BYTES)
        print(f"key: {key}")
    else:
        key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.read()
        key = key.removesuffix("\n").removesuffix("\r")
    if not KEY.fullmatch(key):
        raise SystemExit("a key must be visible ASCII characters without spaces, at least one")
    print(f"sha256: {digest_of(key).hex()}")
