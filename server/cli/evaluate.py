"""`sluice eval`: exact match of any model on the user's tasks, by policy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.offline.evaluate.evaluation import MAX_TOKENS, EvaluationError, by_task, evaluate
from sluice.models.offline.evaluate.http_backend import CONCURRENCY, HttpBackend
from sluice.models.offline.hf_model.examples import CalibrationError, Example, read_tasks
from sluice.models.routing.presets import MODEL_SEPARATOR, NO_PRESET
from sluice.server.cli.extras import require_vllm
from sluice.server.cli.policies import (
    Policies,
    add_policy_argument,
    measure_all,
    read_policies,
    report_results,
)
from sluice.server.cli.progress import Progress

if TYPE_CHECKING:
    from sluice.models.offline.evaluate.evaluation import Backend
    from sluice.models.offline.evaluate.results import PolicyResult

TITLE = "exact match"
_NO_KEY = "EMPTY"


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser(
        "eval",
        help="measure what policies cost in quality on your tasks",
        description="Sends your tasks to a running server (--url), or to a model in this process "
        "(--model FOLDER), under one policy after the other. Prints exact match per task, the "
        "average over the tasks with its 95 % interval, and the work it took. If an item has "
        "choices, the most likely one is the answer.",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines, each with `prompt`, `messages` or `text`, and an `answer`; optionally "
        "`choices` to pick the answer from, and the `task` that the item counts for",
    )
    parser.add_argument("--url", help="server to measure, for example http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--model",
        help="with --url: the model id to send (default: the server's model); without: a model "
        "folder, or a name in the Hugging Face cache, to run in this process",
    )
    parser.add_argument("--api-key", default=_NO_KEY, help="API key of the server (with --url)")
    add_policy_argument(parser, f" (default: {NO_PRESET})")
    parser.add_argument(
        "--presets",
        type=Path,
        metavar="FILE",
        help="presets file, as for `sluice serve` (without --url)",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="profile of the model (without --url)"
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        metavar="BYTES",
        help="K/V cache of a model in this process (default: 1 GiB on a CPU, vLLM's own elsewhere)",
    )
    parser.add_argument(
        "--per-token",
        action="store_true",
        help="pick the choice with the highest mean log probability per token, not the highest sum",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        help="requests at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write a row per policy to this file"
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        SystemExit: 2 for arguments or tasks that do not fit, a server that does not answer, or a
            policy that is refused; what was measured before it is shown.
    """
    from rich.console import Console

    _check(args)
    if args.url is None:
        require_vllm(args.parser.prog)
    try:
        policies = _policies(args)
        tasks = by_task(read_tasks(args.tasks))
    except (ValueError, CalibrationError) as error:
        args.parser.error(str(error))
    examples = [example for group in tasks.values() for example in group]
    try:
        with (
            Progress(Console(stderr=True)) as progress,
            progress.count("items", len(examples) * len(policies)) as answered,
            _backend(args, examples, answered) as backend,
        ):

            def measure(name: str, routing: Mapping[str, Any]) -> PolicyResult:
                return evaluate(backend, tasks, name, routing, args.max_tokens, args.per_token)

            results, failure = measure_all(policies, measure)
    except EvaluationError as error:
        args.parser.error(str(error))
    report_results(args, results, failure, TITLE)


def _check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "concurrency"):
        if getattr(args, name) < 1:
            args.parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.url is None and args.model is None:
        args.parser.error("give --url for a server, or --model FOLDER to run a model here")
    if args.url is None and args.api_key != _NO_KEY:
        args.parser.error("--api-key needs --url")
    for name in ("presets", "profile", "kv_cache_memory_bytes"):
        if args.url is not None and getattr(args, name) is not None:
            args.parser.error(f"--{name.replace('_', '-')} does not go with --url")


def _policies(args: argparse.Namespace) -> Policies:
    """What to measure; without `--policy`, the model as it is.

    Raises:
        ValueError: no JSON, no object, a name that came twice, or a preset by two ways.
    """
    named = args.url is not None and args.model is not None and MODEL_SEPARATOR in args.model
    if not args.policy:
        return {args.model if named else NO_PRESET: {}}
    if named:
        raise ValueError("name the preset with --policy or with --model, not with both")
    return read_policies(args.policy)


@contextmanager
def _backend(
    args: argparse.Namespace, examples: Sequence[Example], answered: Callable[[], None]
) -> Iterator[Backend]:
    """The server, or the model in this process.

    Raises:
        EvaluationError: the server does not answer, or the model cannot be loaded.
    """
    if args.url is not None:
        server = HttpBackend.connect(args.url, args.model, args.api_key, args.concurrency)
        yield replace(server, answered=answered)
        return
    from sluice.models.offline.evaluate.engine_backend import engine_backend

    with engine_backend(
        args.model,
        examples,
        max_tokens=args.max_tokens,
        presets=args.presets,
        profile=args.profile,
        at_once=args.concurrency,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        answered=answered,
    ) as backend:
        yield backend
