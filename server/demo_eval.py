"""`sluice demo eval`: exact match of the demo model per task, on held-out items."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sluice.models.demo import DEMO_MODEL_DIR

DEFAULT_ITEMS = 200
DEFAULT_SEED = 1


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "eval",
        help="exact match per task on held-out items",
        description="Prints exact match per task on held-out items, in process through "
        "transformers, or through a running server with --url. Exits with 1 if a task is under "
        "the bar of the demo model (95 %) and no routing was asked for.",
    )
    parser.add_argument("--url", help="server to ask, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo", help="model id to ask for (with --url)")
    parser.add_argument(
        "--routing", type=json.loads, help="routing object as JSON, sent with --url"
    )
    parser.add_argument("--api-key", default="EMPTY", help="bearer key (with --url)")
    parser.add_argument("--items", type=int, default=DEFAULT_ITEMS, help="held-out items per task")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the item draw")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        SystemExit: 1 if a task is under the bar at full depth, 2 for arguments that do not fit.
    """
    from rich.console import Console

    from sluice.models.demo import evaluate

    if args.items < 1:
        args.parser.error("--items must be at least 1")
    if args.url is None:
        if args.routing is not None:
            args.parser.error("--routing needs --url: plain transformers cannot skip layers")
        scores = evaluate.evaluate_local(DEMO_MODEL_DIR, args.items, args.seed)
    else:
        scores = evaluate.evaluate_server(
            args.url, args.model, args.items, args.seed, args.routing, api_key=args.api_key
        )
    Console().print(evaluate.table(scores))
    routed = args.routing is not None or "@" in args.model
    if not routed and any(score.exact_match < evaluate.BAR for score in scores.values()):
        raise SystemExit(1)
