"""The `sluice` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from sluice.server.cli.extras import require_extra
from sluice.server.cli.parser import STOPPED_STATUS, OneLineParser


@dataclass(frozen=True, slots=True)
class Command:
    """A command with a parser of its own.

    Attributes:
        module: whose `main` takes the arguments and may return an exit status. A name, so that no
            command loads another's packages, and `server` does not know the load test.
        help: one line for `sluice --help`.
        extra: that it needs, if any.
    """

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "serve": Command("sluice.server.cli.serve", "serve a model; takes every flag of `vllm serve`"),
    "calibrate": Command(
        "sluice.server.cli.calibrate", "measure a model and write its profile", "calibrate"
    ),
    "loadtest": Command(
        "sluice.loadtest.__main__", "run load test scenarios against a server", "loadtest"
    ),
}
EXTRAS = {"eval": "eval", "demo": "eval", "report": "report"}
"""What the other commands need."""


def main() -> None:
    """Entry point.

    Raises:
        SystemExit: with the command's status if it is not 0; 130 for Ctrl-C.
    """
    try:
        status = _run(sys.argv[1:])
    except KeyboardInterrupt:
        status = STOPPED_STATUS
    if status:
        raise SystemExit(status)


def _run(argv: list[str]) -> int | None:
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        args = _parser().parse_args(argv)
        if args.command in EXTRAS:
            require_extra(args.parser.prog, EXTRAS[args.command])
        args.run(args)
        return None
    if command.extra is not None:
        require_extra(f"sluice {argv[0]}", command.extra)
    run: Callable[[list[str]], int | None] = import_module(command.module).main
    return run(argv[1:])


def _parser() -> argparse.ArgumentParser:
    from sluice.server.cli.demo import add_parser as add_demo_eval
    from sluice.server.cli.evaluate import add_parser as add_eval
    from sluice.server.cli.keys import add_parser as add_keys_hash
    from sluice.server.cli.report import add_parser as add_report
    from sluice.server.telemetry.build_info import sluice_version, vllm_version

    parser = OneLineParser(
        prog="sluice",
        description="Inference server where each request decides how deep the model runs.",
    )
    versions = f"sluice {sluice_version()}, vLLM {vllm_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(title="commands", required=True, dest="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    add_eval(commands)
    add_report(commands)
    demo = commands.add_parser("demo", help="measure the demo model")
    add_demo_eval(demo.add_subparsers(required=True, dest="demo command"))
    keys = commands.add_parser("keys", help="make API keys for `sluice serve --keys`")
    add_keys_hash(keys.add_subparsers(required=True, dest="keys command"))
    return parser
