"""`sluice demo eval`: exact match of the demo model per task, on held-out items, by policy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.routing.presets import MODEL_SEPARATOR
from sluice.server.cli.extras import require_vllm
from sluice.server.cli.policies import (
    add_policy_argument,
    measure_all,
    read_policies,
    report_results,
)

if TYPE_CHECKING:
    from sluice.models.offline.evaluate.results import PolicyResult

DEFAULT_ITEMS = 200
DEFAULT_SEED = 1
TITLE = "held-out exact match"


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "eval",
        help="measure exact match per task on held-out items",
        description="Prints exact match per task on held-out items: in this process through "
        "transformers, or on a running server with --url. With several policies it prints a "
        "row for each, with the work it took. The exit status is 1 if a task scores below 95 % at "
        "full depth.",
    )
    parser.add_argument("--url", help="server to measure, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo", help="model id to send (with --url)")
    add_policy_argument(parser, " (with --url)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write a row per policy to this file"
    )
    parser.add_argument("--api-key", default="EMPTY", help="API key of the server (with --url)")
    parser.add_argument("--items", type=int, default=DEFAULT_ITEMS, help="held-out items per task")
    parser.add_argument(
        "--longer",
        action="store_true",
        help="use items longer than any that the model was trained on; it answers about half of "
        "them (with --policy)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="random seed that the items are drawn with"
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        SystemExit: 1 if a task is under the bar at full depth, 2 for arguments that do not fit, a
            server that does not answer, or a policy that it refuses.
    """
    from rich.console import Console

    from sluice.models.offline.demo import evaluate
    from sluice.models.offline.evaluate.evaluation import EvaluationError
    from sluice.models.offline.evaluate.score import table

    if args.items < 1:
        args.parser.error("--items must be at least 1")
    if args.json is not None and not args.policy:
        args.parser.error("--json needs --policy: it writes a row per policy")
    if args.longer and not args.policy:
        args.parser.error("--longer needs --policy: it is for comparing policies")
    if args.policy:
        _run_policies(args)
        return
    if args.url is None:
        require_vllm(args.parser.prog)
        scores = evaluate.evaluate_local(DEMO_MODEL_DIR, args.items, args.seed)
    else:
        try:
            scores = evaluate.evaluate_server(
                args.url, args.model, args.items, args.seed, api_key=args.api_key
            )
        except EvaluationError as error:
            args.parser.error(str(error))
    Console().print(table(scores, TITLE, evaluate.BAR))
    if MODEL_SEPARATOR not in args.model:
        _exit_under_bar(scores)


def _run_policies(args: argparse.Namespace) -> None:
    from sluice.models.offline.demo import evaluate
    from sluice.models.offline.evaluate.evaluation import evaluate as evaluate_policy
    from sluice.models.offline.evaluate.http_backend import HttpBackend

    if args.url is None:
        args.parser.error("--policy needs --url: plain transformers has no routing")
    if MODEL_SEPARATOR in args.model:
        args.parser.error("name the preset with --policy or with --model, not with both")
    try:
        policies = read_policies(args.policy)
    except ValueError as error:
        args.parser.error(str(error))
    draw = evaluate.longer_heldout_items if args.longer else evaluate.heldout_items
    tasks = evaluate.examples(draw(args.items, args.seed))
    backend = HttpBackend(args.url, args.model, args.api_key)

    def measure(name: str, routing: Mapping[str, Any]) -> PolicyResult:
        return evaluate_policy(backend, tasks, name, routing, evaluate.MAX_ANSWER_TOKENS)

    results, failure = measure_all(policies, measure)
    report_results(args, results, failure, TITLE, evaluate.BAR)
    if args.longer:
        return
    for result in results:
        if not {key for key in result.routing if key != "report"}:
            _exit_under_bar(result.scores)


def _exit_under_bar(scores: Mapping[str, Any]) -> None:
    from sluice.models.offline.demo.evaluate import BAR

    if any(score.exact_match < BAR for score in scores.values()):
        raise SystemExit(1)
