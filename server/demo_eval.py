"""`sluice demo eval`: exact match of the demo model per task, on held-out items, by policy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.demo import DEMO_MODEL_DIR
from sluice.server.presets import MODEL_SEPARATOR, NO_PRESET

if TYPE_CHECKING:
    from sluice.models.demo.compare import PolicyResult

DEFAULT_ITEMS = 200
DEFAULT_SEED = 1


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "eval",
        help="exact match per task on held-out items",
        description="Prints exact match per task on held-out items, in process through "
        "transformers, or through a running server with --url. With several policies it prints a "
        "row for each, with the work it took. Exits with 1 if a task is under the bar of the demo "
        "model (95 %) at full depth.",
    )
    parser.add_argument("--url", help="server to ask, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo", help="model id to ask for (with --url)")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        help="a preset's name, `none` for full depth, a routing object as JSON, or @FILE with "
        "JSON of names and routing objects; repeatable (with --url)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the policies' rows there")
    parser.add_argument("--api-key", default="EMPTY", help="bearer key (with --url)")
    parser.add_argument("--items", type=int, default=DEFAULT_ITEMS, help="held-out items per task")
    parser.add_argument(
        "--longer",
        action="store_true",
        help="ask items longer than any trained on, of which the model answers about half "
        "(with --policy)",
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the item draw")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        SystemExit: 1 if a task is under the bar at full depth, 2 for arguments that do not fit or
            a policy that the server refuses.
    """
    from rich.console import Console

    from sluice.models.demo import evaluate

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
        scores = evaluate.evaluate_local(DEMO_MODEL_DIR, args.items, args.seed)
    else:
        scores = evaluate.evaluate_server(
            args.url, args.model, args.items, args.seed, api_key=args.api_key
        )
    Console().print(evaluate.table(scores))
    if MODEL_SEPARATOR not in args.model:
        _exit_under_bar(scores)


def _run_policies(args: argparse.Namespace) -> None:
    from openai import BadRequestError
    from rich.console import Console

    from sluice.models.demo import compare, evaluate

    if args.url is None:
        args.parser.error("--policy needs --url: plain transformers knows nothing of routing")
    if MODEL_SEPARATOR in args.model:
        args.parser.error("name the preset with --policy or with --model, not with both")
    try:
        policies = read_policies(args.policy)
    except ValueError as error:
        args.parser.error(str(error))
    drawn = evaluate.longer_heldout_items if args.longer else evaluate.heldout_items
    items = drawn(args.items, args.seed)
    results: list[PolicyResult] = []
    refusal = None
    for name, routing in policies.items():
        try:
            result = compare.evaluate_policy(
                args.url, args.model, items, name, routing, api_key=args.api_key
            )
        except BadRequestError as error:
            refusal = f"policy {name}: {error}"
            break
        results.append(result)
    console = Console()
    if len(policies) == 1 and results:
        console.print(evaluate.table(results[0].scores))
        console.print(compare.averages(results[0]), markup=False)
    elif results:
        console.print(compare.comparison(results))
    if args.json is not None:
        rows = [result.to_wire() for result in results]
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if refusal is not None:
        args.parser.error(refusal)
    if args.longer:
        return
    for result in results:
        if not {key for key in result.routing if key != "report"}:
            _exit_under_bar(result.scores)


def read_policies(texts: list[str]) -> dict[str, Mapping[str, Any]]:
    """`--policy` arguments as routing objects by name, in order.

    Raises:
        ValueError: no JSON, no object, or a name that came twice.
    """
    policies: dict[str, Mapping[str, Any]] = {}
    for text in texts:
        for name, routing in _read_policy(text).items():
            if not isinstance(routing, dict):
                raise ValueError(f"--policy {text}: {name} is no routing object")
            if name in policies:
                raise ValueError(f"--policy {text}: {name} was given before")
            policies[name] = routing
    return policies


def _read_policy(text: str) -> dict[str, Any]:
    if text == NO_PRESET:
        return {NO_PRESET: {}}
    if text.startswith("{"):
        return {text: _json(text, text)}
    if not text.startswith("@"):
        return {text: {"preset": text}}
    try:
        content = Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--policy {text}: {error.strerror}") from None
    named = _json(text, content)
    if not isinstance(named, dict):
        raise ValueError(f"--policy {text}: not an object of names and routing objects")
    return named


def _json(argument: str, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"--policy {argument}: not JSON: {error}") from None


def _exit_under_bar(scores: Mapping[str, Any]) -> None:
    from sluice.models.demo.evaluate import BAR

    if any(score.exact_match < BAR for score in scores.values()):
        raise SystemExit(1)
