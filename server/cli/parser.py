"""The parser of our commands: what is wrong is said in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

USAGE_STATUS = 2
"""Exit status for arguments, files or an environment that do not fit; argparse's own."""
STOPPED_STATUS = 130
"""Exit status of a program that Ctrl-C stopped."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong without the usage, which is long and hides it; `--help` prints that."""

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        line = " ".join(part.strip() for part in message.splitlines())
        self.exit(USAGE_STATUS, f"{self.prog}: error: {line}\n")
