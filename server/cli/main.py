"""The `sluice` command."""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Entry point.

    `serve` has vLLM's parser and `calibrate` one for each step, so both are dispatched before any
    parsing.
    """
    argv = sys.argv[1:]
    if argv[:1] == ["serve"]:
        from sluice.server.cli.serve import main as serve

        serve(argv[1:])
        return
    if argv[:1] == ["calibrate"]:
        from sluice.server.cli.calibrate import main as calibrate

        calibrate(argv[1:])
        return
    args = _parser().parse_args(argv)
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    from sluice.server.cli.demo import add_parser as add_demo_eval
    from sluice.server.cli.evaluate import add_parser as add_eval
    from sluice.server.cli.keys import add_parser as add_keys_hash
    from sluice.server.cli.report import add_parser as add_report
    from sluice.server.telemetry.build_info import sluice_version, vllm_version

    parser = argparse.ArgumentParser(
        prog="sluice",
        description="Inference server where each request decides how deep the model runs.",
    )
    versions = f"sluice {sluice_version()}, vLLM {vllm_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(title="commands", required=True)
    commands.add_parser("serve", help="serve a model; takes every flag of `vllm serve`")
    commands.add_parser("calibrate", help="measure a model and write its profile")
    add_eval(commands)
    add_report(commands)
    demo = commands.add_parser("demo", help="measure the demo model")
    add_demo_eval(demo.add_subparsers(required=True))
    keys = commands.add_parser("keys", help="make API keys for `sluice serve --keys`")
    add_keys_hash(keys.add_subparsers(required=True))
    return parser
