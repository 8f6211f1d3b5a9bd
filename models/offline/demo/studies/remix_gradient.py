"""Pathways for prompts of the demo model.

Run as ``python -m sluice.models.offline.demo.studies.remix_gradient``.

Reads prompts, a JSON object with ``prompt`` a line, and writes for each a ``routing`` object with
the pathway that C3PO's gradient form finds (`sluice.models.offline.hf_model.pathway_gradient`),
ready to be sent with that prompt as a one-turn chat, and what finding it cost. Neighbours are
samples of the training split that the model answers right, by the same embedding as the server's.
On one core it takes half a second a prompt: 12 forward and 10 backward passes, one forward pass
over the prompt and the others over its 3 neighbours.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sluice.models.experts.remix import prompt_embedding
from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.studies.references import (
    PER_TASK,
    References,
    encoded,
    find_references,
)
from sluice.models.offline.demo.tasks.tasks import Item
from sluice.models.offline.demo.training.model import Model, load_model
from sluice.models.offline.hf_model.moe import softmax_routers
from sluice.models.offline.hf_model.pathway_gradient import (
    DEFAULT_STEPS,
    FIRST_RATE,
    Neighbour,
    OptimisedPathway,
    optimise_pathway,
)
from sluice.models.policy.experts import (
    REMIX_BANDWIDTH,
    REMIX_LAYERS,
    REMIX_MAX_SIMILARITY,
    REMIX_NEIGHBORS,
    REMIX_TOP,
)


class Neighbourhood:
    """Finds neighbours of prompts among references, as the server does for kernel regression.

    Embeddings are compared after their mean is taken off, by cosine; weights are Gaussian in their
    distance.
    """

    def __init__(
        self,
        references: References,
        count: int = REMIX_NEIGHBORS,
        max_similarity: float = REMIX_MAX_SIMILARITY,
    ) -> None:
        """Take `count` references for each prompt, leaving out those more similar."""
        self._samples = [encoded(item) for item in references.items]
        self._center = references.embeddings.mean(0)
        self._directions = _unit(references.embeddings - self._center)
        self._count, self._max_similarity = count, max_similarity

    def of(self, embedding: Tensor) -> list[Neighbour]:
        """The nearest references to a prompt's embedding, fp32, (hidden,), nearest first."""
        cosine = self._directions @ _unit(embedding - self._center)
        near = (cosine <= self._max_similarity).nonzero().flatten()
        chosen = near[cosine[near].sort(descending=True, stable=True).indices[: self._count]]
        weights = torch.exp((cosine[chosen] - 1.0) / REMIX_BANDWIDTH**2)
        pairs = zip(chosen.tolist(), weights.tolist(), strict=True)
        return [Neighbour(self._samples[index], weight) for index, weight in pairs]


def prompt_ids(prompt: str) -> tuple[int, ...]:
    """Token ids of a one-turn chat with this prompt, as the server makes them."""
    return encoded(Item(task="", prompt=prompt, answer="?")).prompt


def found_pathways(
    model: Model,
    prompts: Sequence[str],
    neighbourhood: Neighbourhood,
    layers: Sequence[int],
    steps: int = DEFAULT_STEPS,
    first_rate: float = FIRST_RATE,
) -> Iterator[OptimisedPathway]:
    """Optimise a pathway for each prompt; see `optimise_pathway`."""
    for prompt in prompts:
        ids = prompt_ids(prompt)
        with torch.no_grad():
            embedding = prompt_embedding(model.get_input_embeddings()(torch.tensor(ids)))
        yield optimise_pathway(
            model, ids, neighbourhood.of(embedding), layers, steps=steps, first_rate=first_rate
        )


def routing_of(found: OptimisedPathway) -> dict[str, Any]:
    """The ``routing`` object that applies a pathway."""
    return {
        "experts": {
            "remix": {
                "method": "supplied",
                "scope": "last",
                "alpha": 0.0,
                "layers": list(found.layers),
                "top": min(REMIX_TOP, found.pathway.size(1)),
                "pathway": found.pathway.tolist(),
            }
        }
    }


def to_wire(prompt: str, found: OptimisedPathway) -> dict[str, Any]:
    """One line of the output, as JSON values."""
    return {
        "prompt": prompt,
        "routing": routing_of(found),
        "loss": {"before": found.losses[0], "after": found.losses[-1]},
        "cost": {
            "seconds": round(found.seconds, 3),
            "forward_passes": found.forward_passes,
            "backward_passes": found.backward_passes,
            "tokens_per_pass": found.pass_tokens,
        },
    }


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file with a JSON object a line.

    Raises:
        ValueError: a line that is no object with a `prompt` of text.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(f'{path}, line {number}: no object with a "prompt"')
        prompts.append(value["prompt"])
    return prompts


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.demo.studies.remix_gradient", description=__doc__
    )
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, in the same order")
    parser.add_argument("--seed", type=int, default=5, help="seed of the references' draw")
    parser.add_argument("--references", type=int, default=PER_TASK, help="references per task")
    parser.add_argument(
        "--last-layers", type=int, default=REMIX_LAYERS, help="critical layers, from the end"
    )
    parser.add_argument("--neighbors", type=int, default=REMIX_NEIGHBORS)
    parser.add_argument("--max-similarity", type=float, default=REMIX_MAX_SIMILARITY)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--rate", type=float, default=FIRST_RATE, help="first learning rate")
    arguments = parser.parse_args()
    try:
        prompts = read_prompts(arguments.prompts)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model = load_model(DEMO_MODEL_DIR)
    references = find_references(model, arguments.seed, arguments.references)
    layers = tuple(softmax_routers(model))[-arguments.last_layers :]
    near = Neighbourhood(references, arguments.neighbors, arguments.max_similarity)
    found = found_pathways(model, prompts, near, layers, arguments.steps, arguments.rate)
    seconds = 0.0
    with arguments.out.open("w", encoding="utf-8") as out:
        for prompt, pathway in zip(prompts, found, strict=True):
            out.write(json.dumps(to_wire(prompt, pathway)) + "\n")
            seconds += pathway.seconds
    each = arguments.steps
    print(
        f"{len(prompts)} pathways, {seconds / max(1, len(prompts)):.2f} s each: {each + 2} forward "
        f"and {each} backward passes, all but one over {arguments.neighbors} neighbours"
    )


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


if __name__ == "__main__":
    main()
