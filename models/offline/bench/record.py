"""Records what policies run on the demo model's held-out items, for `plans.json`.

``python -m sluice.models.offline.bench.record --url URL/v1 --policies FILE --out FILE``, where the
policies' file is JSON of names and `routing` objects, and the server serves the demo model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sluice.models.offline.demo.evaluate import MAX_ANSWER_TOKENS, heldout_items
from sluice.models.offline.evaluate.http_backend import CONCURRENCY, HttpBackend
from sluice.models.offline.hf_model.examples import Example
from sluice.models.policy.policy import Phase


def recorded(
    server: HttpBackend, routing: Mapping[str, Any], items: int, seed: int
) -> dict[str, Any]:
    """One policy's entry; see `sluice.models.offline.bench.plans`.

    Raises:
        EvaluationError: the server fails or refuses the policy.
    """
    asked = [item for group in heldout_items(items, seed).values() for item in group]
    examples = [Example(prompt=item.prompt) for item in asked]
    replies = server.answers(examples, {**routing, "report": True}, MAX_ANSWER_TOKENS)
    reports = [reply.reports[0] for reply in replies]
    right = [reply.text.strip() == item.answer for reply, item in zip(replies, asked, strict=True)]
    rule = reports[0]["policy"].get("depth", {}).get("exit")
    return {
        "routing": dict(routing),
        "exact_match": sum(right) / len(right),
        "tested": rule["layers"] if rule else [],
        "exits": [layer for report in reports for layer in report.get("exit_layers", ())],
        "skips": _different([_left_out(report) for report in reports]),
        "bars": {},
    }


def _left_out(report: Mapping[str, Any]) -> dict[str, list[int]]:
    """Layers whose sub-layers a request's generated tokens left out, exits aside."""
    if "mask" in report:
        return {"attention": report["mask"], "mlp": report["mask"]}
    depth = report["policy"].get("depth", {})
    skip = depth.get("skip", {}) if depth.get("phase") in (Phase.DECODE, Phase.BOTH) else {}
    return {module: skip.get(module, []) for module in ("attention", "mlp")}


def _different(skips: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """One entry where all requests left out the same, none where nobody left out anything."""
    if all(skip == skips[0] for skip in skips):
        skips = skips[:1]
    return skips if any(skip["attention"] or skip["mlp"] for skip in skips) else []


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.bench.record", description=__doc__
    )
    parser.add_argument("--url", required=True, help="address up to and including /v1")
    parser.add_argument("--model", default="demo", help="model id to ask for")
    parser.add_argument("--policies", type=Path, required=True, help="names and routing objects")
    parser.add_argument("--items", type=int, default=20, help="held-out items per task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8, help="of the demo model")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    server = HttpBackend.connect(args.url, args.model, "EMPTY", CONCURRENCY)
    policies = {
        name: recorded(server, routing, args.items, args.seed)
        for name, routing in json.loads(args.policies.read_text()).items()
    }
    content = {"layers": args.layers, "policies": policies}
    args.out.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
