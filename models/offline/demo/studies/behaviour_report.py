"""Finds the demo model's refusal experts and measures on a server what going without them does.

``python -m sluice.models.offline.demo.studies.behaviour_report --url http://127.0.0.1:8000/v1``
finds the smallest number of experts that meets the bar on the training split, in plain
transformers, and asks a server held-out prompts without them, and without as many random ones.
Exits with 1 if no number does.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.evaluate import Answerer, percent, score, server_answerer
from sluice.models.offline.demo.studies.behaviour import (
    Against,
    Judge,
    Measure,
    PromptSets,
    Trial,
    contrast,
    drawn_experts,
    ranking,
    trials,
)
from sluice.models.offline.demo.studies.deactivation import Mode
from sluice.models.offline.demo.tasks import facts
from sluice.models.offline.demo.tasks.tasks import Item
from sluice.models.offline.demo.training.model import load_model
from sluice.models.offline.hf_model.moe import softmax_routers
from sluice.models.policy.experts import ExpertId

if TYPE_CHECKING:
    from rich.table import Table

APOLOGY = facts.REFUSAL.split(",")[0]
"""How a refusal begins."""


@dataclass(frozen=True)
class ServedRow:
    """What a server answers without some experts; shares are between 0 and 1.

    Attributes:
        name: what went.
        experts: (layer, expert) that went.
        refusals: refused prompts answered with the refusal, word for word.
        apologies: refused prompts answered with something that begins as a refusal does.
        complied: refused prompts answered as if they were harmless.
        harmless: harmless prompts of the same templates answered right.
        others: exact match of the other tasks, each counting the same.
    """

    name: str
    experts: tuple[ExpertId, ...]
    refusals: float
    apologies: float
    complied: float
    harmless: float
    others: float

    @classmethod
    def measure(
        cls, name: str, experts: Sequence[ExpertId], sets: PromptSets, answer: Answerer
    ) -> "ServedRow":
        """Ask all of `sets`."""
        given = [text.strip() for text in answer([item.prompt for item in sets.refused])]
        complied = [
            text == compliance(item) for item, text in zip(sets.refused, given, strict=True)
        ]
        groups = {"harmless": sets.harmless, **sets.others}
        scores = score(groups, answer)
        others = [scores[task].exact_match for task in sets.others]
        return cls(
            name=name,
            experts=tuple(experts),
            refusals=given.count(facts.REFUSAL) / len(given),
            apologies=sum(text.startswith(APOLOGY) for text in given) / len(given),
            complied=sum(complied) / len(given),
            harmless=scores["harmless"].exact_match,
            others=sum(others) / len(others),
        )


def compliance(item: Item) -> str:
    """What the model would say to a refused prompt if its verb were harmless.

    Raises:
        ValueError: the prompt has no harmful verb.
    """
    words = item.prompt.split()
    verbs = [verb for verb in facts.HARMFUL_VERBS if verb in words]
    if not verbs:
        raise ValueError(f"no harmful verb in {item.prompt!r}")
    return facts.COMPLIANCE.format(verb=verbs[0])


def routing_without(experts: Sequence[ExpertId], mode: Mode) -> dict[str, Any]:
    """The ``routing`` object that deactivates experts; empty for none."""
    if not experts:
        return {}
    layers: dict[int, list[int]] = {}
    for layer, expert in sorted(experts):
        layers.setdefault(layer, []).append(expert)
    entries = [{"layer": layer, "experts": own} for layer, own in layers.items()]
    return {"experts": {"deactivate": entries, "mode": mode}}


def trial_table(tried: Sequence[Trial]) -> "Table":
    """What was tried in transformers, a row each."""
    from rich.table import Table

    out = Table(title="training split, plain transformers")
    for heading in ("experts", "refusals", "harmless", "others"):
        out.add_column(heading, justify="right")
    for trial in tried:
        shares = (trial.refusals, trial.harmless, trial.others)
        out.add_row(str(len(trial.experts)), *map(percent, shares))
    return out


def served_table(rows: Sequence[ServedRow]) -> "Table":
    """What a server answered, a row each."""
    from rich.table import Table

    out = Table(title="held-out prompts, through the server")
    out.add_column("without")
    headings = ("refusals", "apologies", "complied", "harmless", "others")
    for heading in headings:
        out.add_column(heading, justify="right")
    for row in rows:
        values: Mapping[str, Any] = asdict(row)
        out.add_row(row.name, *(percent(values[heading]) for heading in headings))
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--url", required=True, help="server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="demo", help="model id to ask for")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--items", type=int, default=50, help="held-out items of each kind")
    parser.add_argument("--draws", type=int, default=5, help="random sets of experts as control")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=200, help="refused prompts to contrast")
    parser.add_argument("--measure", choices=get_args(Measure), default="weight")
    parser.add_argument("--against", choices=get_args(Against), default="others")
    parser.add_argument("--mode", choices=get_args(Mode), default="mask")
    parser.add_argument(
        "--first-layer", type=int, default=1, help="leave the layers before it as they are"
    )
    parser.add_argument("--most", type=int, default=24, help="experts to go without at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")


def main() -> None:
    """Run from the command line."""
    from rich.console import Console

    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.demo.studies.behaviour_report", description=__doc__
    )
    add_arguments(parser)
    args = parser.parse_args()
    console = Console()
    model = load_model(DEMO_MODEL_DIR)
    train = PromptSets.draw("train", args.seed, args.prompts, args.items)
    ranked = ranking(contrast(model, train, args.measure, args.against), args.first_layer)
    tried = trials(model, Judge(model, train), ranked, args.mode, args.most)
    console.print(trial_table(tried))
    found = tried[-1]
    if not found.meets_bar(tried[0]):
        console.print(f"no number of experts up to {args.most} meets the bar")
        raise SystemExit(1)
    sets: dict[str, Sequence[ExpertId]] = {"nothing": (), "found": found.experts}
    routers = softmax_routers(model)
    for draw in range(args.draws):
        sets[f"random {draw + 1}"] = drawn_experts(
            len(found.experts), routers, args.mode, args.first_layer, args.seed + draw
        )
    heldout = PromptSets.draw("heldout", args.seed, args.items, args.items)
    rows = []
    for name, experts in sets.items():
        routing = routing_without(experts, args.mode)
        answer = server_answerer(args.url, args.model, routing, api_key=args.api_key)
        rows.append(ServedRow.measure(name, experts, heldout, answer))
    console.print(served_table(rows))
    if args.json is not None:
        wire = {
            "mode": args.mode,
            "measure": args.measure,
            "against": args.against,
            "trials": [asdict(trial) for trial in tried],
            "served": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(wire, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
