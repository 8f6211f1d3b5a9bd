"""What a command needs beyond the plain package, named when it is not installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

from sluice.server.cli.parser import OneLineParser
from sluice.server.telemetry.build_info import DISTRIBUTION, NOT_INSTALLED, vllm_version

VLLM_EXTRA = "cuda"
_REQUIREMENT = re.compile(r"(?P<package>[\w.-]+).*;.*\bextra == ['\"](?P<extra>[\w-]+)['\"]")


def require_extra(command: str, extra: str) -> None:
    """Exit with one line if packages of an extra are not installed.

    Args:
        command: that needs them, for example `sluice eval`.
        extra: of our distribution, by its name in `pyproject.toml`.

    Raises:
        SystemExit: a package is missing; the status is 2.
    """
    missing = [package for package in packages_of(extra) if not _installed(package)]
    if missing:
        OneLineParser(prog=command).error(
            f'{" and ".join(missing)} not installed: pip install "{DISTRIBUTION}[{extra}]"'
        )


def require_vllm(command: str) -> None:
    """Exit with one line if vLLM is not installed.

    Args:
        command: that needs it.

    Raises:
        SystemExit: it is missing; the status is 2.
    """
    if vllm_version() == NOT_INSTALLED:
        OneLineParser(prog=command).error(
            f'vLLM not installed: on a GPU pip install "{DISTRIBUTION}[{VLLM_EXTRA}]", '
            "on a CPU see docs/installation.md"
        )


def packages_of(extra: str) -> tuple[str, ...]:
    """The packages of an extra, as the installed metadata has them."""
    matches = map(_REQUIREMENT.match, requires(DISTRIBUTION) or ())
    return tuple(match["package"] for match in matches if match and match["extra"] == extra)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
