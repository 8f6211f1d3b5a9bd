"""`sluice loadtest SCENARIO --url URL --out FOLDER`, also `python -m sluice.loadtest`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sluice.loadtest.clients.guidellm_runs import GuidellmError
from sluice.loadtest.probes.memory import ServerNotFoundError
from sluice.loadtest.probes.server_process import NotStartedError, server_process
from sluice.loadtest.report.files import write_report
from sluice.loadtest.report.terminal import print_table
from sluice.loadtest.report.verdict import verdicts
from sluice.loadtest.run import ServerRefusesError, run_scenario
from sluice.loadtest.workload.scenario import Scenario, ScenarioError, shipped

_OVERRIDES = ("seed", "duration", "rounds")
_SERVE = "--enforce-eager"


def main(argv: list[str] | None = None) -> int:
    """Run scenarios: 0 if all bars were met, 1 if one was missed, 2 if a scenario could not run."""
    parser = _parser()
    args = parser.parse_args(argv)
    changed = {name: getattr(args, name) for name in _OVERRIDES if getattr(args, name) is not None}
    try:
        scenarios = {name: Scenario.load(name) for name in args.scenario}
        if changed:
            scenarios = {name: each.changed(**changed) for name, each in scenarios.items()}
        args.out.mkdir(parents=True, exist_ok=True)
        with _server(args) as url:
            met = [_play(name, scenario, url, args) for name, scenario in scenarios.items()]
    except (
        ScenarioError,
        ServerRefusesError,
        ServerNotFoundError,
        NotStartedError,
        GuidellmError,
        httpx.HTTPError,
        OSError,
    ) as error:
        parser.error(str(error) or repr(error))
    return 0 if all(met) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice loadtest",
        description="Runs load test scenarios against a server and writes a report of each.",
    )
    parser.add_argument(
        "scenario", nargs="+", help=f"scenario file, or one of: {', '.join(shipped())}"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="server to load, for example http://127.0.0.1:8000")
    where.add_argument(
        "--serve",
        nargs="?",
        const=_SERVE,
        metavar="ARGUMENTS",
        help="start `sluice serve ARGUMENTS` (default: %(const)s, the demo model) and stop it "
        "afterwards",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for the reports"
    )
    parser.add_argument("--api-key", help="API key of the server")
    parser.add_argument("--seed", type=int, help="random seed (default: the scenario's)")
    parser.add_argument(
        "--duration",
        type=float,
        metavar="SECONDS",
        help="how long each stage lasts (default: the scenario's)",
    )
    parser.add_argument(
        "--rounds", type=int, help="how often everything is measured (default: the scenario's)"
    )
    return parser


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    if args.url is not None:
        yield args.url.rstrip("/").removesuffix("/v1")
        return
    with server_process(args.serve.split(), args.out / "server.log") as url:
        yield url


def _play(name: str, scenario: Scenario, url: str, args: Any) -> bool:
    """Run one scenario and write its report; whether all bars were met."""

    def say(line: str) -> None:
        print(f"{name}: {line}", file=sys.stderr, flush=True)

    results = asyncio.run(run_scenario(scenario, url, args.api_key, say))
    folder = args.out / Path(name).stem
    write_report(results, folder)
    print_table(results, folder)
    return all(verdict.met for verdict in verdicts(results))


if __name__ == "__main__":
    sys.exit(main())
