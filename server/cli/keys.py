"""`sluice keys hash`: the hash of a key for the keys file, so that nobody hashes by hand."""

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
        description="Read a key from standard input, or make one with --new, and print the line "
        "that the keys file takes.",
    )
    parser.add_argument("--new", action="store_true", help="make a random key and print it too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.new:
        key = secrets.token_urlsafe(_NEW_KEY_BYTES)
        print(f"key: {key}")
    else:
        key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.read()
        key = key.removesuffix("\n").removesuffix("\r")
    if not KEY.fullmatch(key):
        raise SystemExit("a key is one or more visible ASCII characters, without spaces")
    print(f"sha256: {digest_of(key).hex()}")
