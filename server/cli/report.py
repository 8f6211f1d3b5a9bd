"""`sluice report`: a profile as an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEFAULT_NAME = "report.html"


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "report",
        help="write a profile as one HTML page",
        description="Writes a profile as one HTML page that opens from disk: how the profile was "
        "made, what each layer and expert does, the exits and their risk, and the frontier with "
        "its presets.",
    )
    parser.add_argument("profile", type=Path, metavar="DIR", help="folder of the profile")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"file to write (default: {DEFAULT_NAME} in the current folder)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Write the page and print where it is.

    Raises:
        SystemExit: 2 for a profile that cannot be used, or a file that cannot be written.
    """
    from sluice.models.offline.report.page import report_page
    from sluice.models.profile.profile import Profile, ProfileError
    from sluice.models.profile.writer import write_whole

    try:
        profile = Profile.load(args.profile)
    except ProfileError as error:
        args.parser.error(str(error))
    out: Path = args.out if args.out is not None else Path(DEFAULT_NAME)
    try:
        write_whole(out, report_page(profile).encode())
    except OSError as error:
        args.parser.error(f"{out}: {error.strerror}")
    print(out)
