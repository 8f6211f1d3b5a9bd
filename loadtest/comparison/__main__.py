"""`python -m sluice.loadtest.comparison MODEL --policies FILE --prompts FILE --out FILE`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from sluice.loadtest.comparison.decode import AnswerError
from sluice.loadtest.comparison.pairs import Comparison
from sluice.loadtest.probes.server_process import (
    STOCK_VLLM,
    NotStartedError,
    server_process,
)
from sluice.models.engine.workers import CPU_KV_CACHE_BYTES
from sluice.models.offline.hf_model.examples import CalibrationError, read_examples
from sluice.models.offline.intervals import LEAST_REPEATS
from sluice.models.offline.provenance import provenance

_MODEL = "model"
NO_ROUTING = "no routing"


def main(argv: list[str] | None = None) -> int:
    """Start both servers, measure, and write the file.

    Returns:
        0, or 2 if something could not be measured.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}")
    if args.routed is not None and not 0 < args.routed < min(args.batch):
        parser.error("--routed must be above 0 and below every --batch")
    try:
        comparison = _comparison(args)
        rows = _measured(args, comparison)
    except (
        AnswerError,
        CalibrationError,
        NotStartedError,
        httpx.HTTPError,
        OSError,
        json.JSONDecodeError,
    ) as error:
        parser.error(str(error) or repr(error))
    found = {
        **provenance(),
        "tokens": args.tokens,
        "repeats": args.repeats,
        "routed": args.routed,
        "mode": "eager" if "--enforce-eager" in args.serve_arguments.split() else "compiled",
        "rows": rows,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sluice.loadtest.comparison",
        description="Serves MODEL by Sluice and by stock vLLM with the same flags, sends both the "
        "same prompts in turn, and writes how long the tokens of each policy took. The servers' "
        "logs are written beside the file.",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder")
    parser.add_argument(
        "--policies",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON object of names and routing objects; `no routing` is measured too",
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="JSON lines, each a `prompt`"
    )
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="profile of MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument(
        "--repeats", type=int, default=LEAST_REPEATS, help="pairs of each policy and batch"
    )
    parser.add_argument(
        "--routed",
        type=int,
        metavar="N",
        help="only N requests of each batch have the policy, and the times are of the others",
    )
    parser.add_argument(
        "--serve-arguments", default="", metavar="ARGUMENTS", help="for both servers"
    )
    return parser


def _comparison(args: argparse.Namespace) -> Comparison:
    policies = json.loads(args.policies.read_text(encoding="utf-8"))
    prompts = [example.prompt or "" for example in read_examples(args.prompts)]
    return Comparison(
        _MODEL,
        prompts,
        {NO_ROUTING: None, **policies},
        args.batch,
        args.repeats,
        args.tokens,
        args.routed,
    )


def _measured(args: argparse.Namespace, comparison: Comparison) -> list[dict[str, Any]]:
    shared = [
        str(Path(args.model).resolve()),
        *("--served-model-name", _MODEL),
        *("--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)),
        *args.serve_arguments.split(),
    ]
    profile = [] if args.profile is None else ["--profile", str(args.profile.resolve())]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say("starting both servers")
    with (
        server_process(shared, args.out.with_suffix(".stock.log"), STOCK_VLLM) as stock,
        server_process([*shared, *profile], args.out.with_suffix(".sluice.log")) as ours,
    ):
        rows = comparison.run(stock, ours, say)
    return [row.to_wire() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
