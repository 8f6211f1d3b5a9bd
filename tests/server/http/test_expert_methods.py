"""Re-mix (C3PO) and contrast (SCMoE) of the demo model through HTTP, against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch
from support.references.experts import ExpertReference
from support.references.remixes import ReferenceStore, Remixer
from torch import Tensor

from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.offline.demo.studies.references import encoded
from sluice.models.offline.demo.tasks.tasks import longer_items
from sluice.models.offline.hf_model.moe import MoeLayer, rerouted, softmax_routers
from sluice.models.offline.hf_model.pathway_gradient import pathway_taken
from sluice.models.policy.experts import Contrast, ExpertPolicy, Remix, RemixMethod, RemixScope
from sluice.models.profile.profile import Profile

LAYERS = (3, 4, 5, 6, 7)
EVERY = tuple(range(8))
TOKENS = 6
ITEMS = [item for task in ("lookup", "count", "recall") for item in longer_items(task, 8, 2)]


@pytest.fixture(scope="module")
def reference() -> ExpertReference:
    return ExpertReference(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def store() -> ReferenceStore:
    profile = Profile.load(DEMO_PROFILE_DIR)
    tensors = {name: part.float() for name, part in profile.reference_tensors("all").items()}
    return ReferenceStore(**tensors, layers=profile.references["all"].layers)


def remix(method: RemixMethod, scope: RemixScope, **values: Any) -> Remix:
    """With the defaults of the wire form."""
    found: dict[str, Any] = {"alpha": 0.5, "layers": LAYERS, "top": 16}
    if method is not RemixMethod.SUPPLIED:
        found |= {"references": "all", "neighbors": 3, "kernel": "gaussian", "bandwidth": 0.5}
    if method is RemixMethod.KERNEL:
        found |= {"max_similarity": 0.95}
    return Remix(method, scope, **{**found, **values})


UPSIDE_DOWN = tuple(
    tuple(float(16 - e if layer % 2 else e + 1) for e in range(16)) for layer in EVERY
)

REMIXES: dict[str, tuple[dict[str, Any], Remix]] = {
    "kernel": (
        {"method": "kernel", "layers": [*LAYERS]},
        remix(RemixMethod.KERNEL, RemixScope.LAST),
    ),
    "kernel, generated tokens too": (
        {"method": "kernel", "alpha": 0.0, "scope": "decode", "max_similarity": 1.0},
        remix(RemixMethod.KERNEL, RemixScope.DECODE, alpha=0.0, layers=EVERY, max_similarity=1.0),
    ),
    "mode": (
        {"method": "mode", "alpha": 0.0, "scope": "decode", "neighbors": 2},
        remix(RemixMethod.MODE, RemixScope.DECODE, alpha=0.0, layers=EVERY, neighbors=2),
    ),
    "supplied": (
        {
            "method": "supplied",
            "alpha": 0.0,
            "layers": [*EVERY],
            "pathway": [[*row] for row in UPSIDE_DOWN],
        },
        remix(
            RemixMethod.SUPPLIED,
            RemixScope.LAST,
            alpha=0.0,
            layers=EVERY,
            pathway=UPSIDE_DOWN,
        ),
    ),
}


def ask(client: openai.OpenAI, prompt: str, experts: dict[str, Any] | None) -> Any:
    """A greedy chat of a few tokens, its end among them."""
    routing: dict[str, Any] = {"report": True}
    if experts is not None:
        routing["experts"] = experts
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=TOKENS,
        logprobs=True,
        top_logprobs=8,
        extra_body={"routing": routing, "ignore_eos": True, "return_token_ids": True},
    )


def tokens_of(answer: Any) -> list[int]:
    return list((answer.choices[0].model_extra or {})["token_ids"])


def first_logprobs(answer: Any) -> dict[str, float]:
    """Of the first token's likeliest ones that are characters."""
    content = answer.choices[0].logprobs.content[0]
    return {each.token: each.logprob for each in content.top_logprobs if len(each.token) == 1}


@pytest.mark.parametrize("name", REMIXES)
def test_remixed_tokens_are_those_of_transformers(
    name: str, client: openai.OpenAI, reference: ExpertReference, store: ReferenceStore
) -> None:
    fields, value = REMIXES[name]
    policy = ExpertPolicy(remix=value)
    for item in ITEMS:
        answer = ask(client, item.prompt, {"remix": fields})
        run = reference.run(encoded(item).prompt, policy, TOKENS, references={"all": store})
        assert tokens_of(answer) == run.tokens, item.prompt


def test_a_foreign_pathway_changes_answers(client: openai.OpenAI) -> None:
    fields, _ = REMIXES["supplied"]
    plain = [tokens_of(ask(client, item.prompt, None)) for item in ITEMS]
    assert plain != [tokens_of(ask(client, item.prompt, {"remix": fields})) for item in ITEMS]


def test_a_remixed_prompt_has_the_logits_of_its_pathway(
    client: openai.OpenAI, reference: ExpertReference, store: ReferenceStore
) -> None:
    """The mean pathway of the nearest references, taken by the last prompt token alone."""
    routers = {layer: softmax_routers(reference.model)[layer] for layer in LAYERS}
    moved = []
    for item in ITEMS:
        prompt = encoded(item).prompt
        remixer = Remixer(
            remix(RemixMethod.KERNEL, RemixScope.LAST, alpha=0.0),
            store,
            reference.embedding(prompt),
        )
        even = [1 / 16] * 16
        pathway = torch.tensor([remixer.remixed(layer, even) for layer in LAYERS])
        with torch.no_grad(), pathway_taken(routers, torch.tensor([len(prompt) - 1]), pathway):
            expected = last_logits(reference, prompt).log_softmax(-1)
        given = first_logprobs(
            ask(
                client,
                item.prompt,
                {"remix": {"method": "kernel", "alpha": 0.0, "layers": [*LAYERS]}},
            )
        )
        stock = first_logprobs(ask(client, item.prompt, None))
        for token, value in given.items():
            assert value == pytest.approx(float(expected[token_id(token)]), abs=2e-3), item.prompt
        moved += [abs(given[token] - stock[token]) for token in given.keys() & stock.keys()]
    assert max(moved) > 0.1, "the last layers' pathway is in the logits"


@pytest.mark.parametrize(
    ("rank", "beta", "alpha"), [(1, 0.5, 0.1), (15, 2.0, 1e-6), (0, 1.0, 1e-3)]
)
def test_contrasted_answers_are_those_of_transformers(
    client: openai.OpenAI, reference: ExpertReference, rank: int, beta: float, alpha: float
) -> None:
    contrast = {"weak_rank": rank, "beta": beta, "alpha": alpha}
    policy = ExpertPolicy(contrast=Contrast(rank, beta, alpha))
    routers = softmax_routers(reference.model)

    def only(_router: MoeLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = scores.argsort(dim=-1, descending=True)[:, rank : rank + 1]
        return torch.ones_like(ids, dtype=scores.dtype), ids

    for item in ITEMS:
        prompt = encoded(item).prompt
        answer = ask(client, item.prompt, {"contrast": contrast})
        assert tokens_of(answer) == reference.run(prompt, policy, TOKENS).tokens, item.prompt
        with torch.no_grad():
            strong = last_logits(reference, prompt)
            with rerouted(routers, only):
                weak = last_logits(reference, prompt)
        mixed = (1 + beta) * strong - beta * weak
        possible = (
            strong.log_softmax(-1) >= strong.log_softmax(-1).max() + torch.tensor(alpha).log()
        )
        expected = mixed.masked_fill(~possible, float("-inf")).log_softmax(-1)
        for token, value in first_logprobs(answer).items():
            # What cannot be is a large negative number in vLLM's answers.
            likely = float(expected[token_id(token)])
            assert value == pytest.approx(max(likely, -9999.0), abs=5e-3), (item.prompt, token)


def test_a_contrast_reports_its_second_pass(client: openai.OpenAI) -> None:
    item = ITEMS[0]
    answer = ask(client, item.prompt, {"contrast": {"weak_rank": 2}})
    report = (answer.model_extra or {})["routing"]
    # Every token but the last generated one runs through the weak pass as well.
    assert report["experts"]["weak"]["tokens"] == len(encoded(item).prompt) + TOKENS - 1
    plain = (ask(client, item.prompt, None).model_extra or {})["routing"]
    assert "weak" not in plain.get("experts", {})


def token_id(token: str) -> int:
    from sluice.models.offline.demo.training.tokenizer import vocabulary

    return vocabulary()[token]


def last_logits(reference: ExpertReference, prompt: Sequence[int]) -> Tensor:
    logits: Tensor = reference.model(input_ids=torch.tensor([[*prompt]])).logits[0, -1]
    return logits
