"""C3PO's gradient form: what it descends, its gradient, and its pathways in an engine."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from support.engine import engine
from torch import Tensor

from sluice.models.experts.remix import prompt_embedding
from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.studies.references import encoded, find_references
from sluice.models.offline.demo.studies.remix_gradient import (
    Neighbourhood,
    found_pathways,
    main,
    prompt_ids,
    read_prompts,
    routing_of,
)
from sluice.models.offline.demo.tasks.tasks import distinct
from sluice.models.offline.demo.training.model import Model, build_model, demo_config, load_model
from sluice.models.offline.hf_model.pathway_gradient import (
    Neighbour,
    critical_routers,
    neighbour_batch,
    neighbour_loss,
    optimise_pathway,
    own_pathway,
    pathway_taken,
)
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.experts import ExpertPolicy, Remix, RemixMethod, RemixScope
from sluice.models.policy.policy import RoutingPolicy

NEIGHBOURS = (
    Neighbour(Sample((3, 20, 21, 22, 4), (30, 31, 5)), 1.0),
    Neighbour(Sample((3, 40, 41, 4), (50, 5)), 0.25),
)
LAYERS = tuple(range(8))
PROMPT = (3, 20, 21, 23, 24, 4)


@pytest.fixture
def tiny() -> Model:
    model: Model = build_model(demo_config(layers=3, hidden=64, experts=8), seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(DEMO_MODEL_DIR)


def loss_of(model: Model, pathway: Tensor, layers: tuple[int, ...]) -> Tensor:
    routers = critical_routers(model, layers)
    weights = torch.tensor([each.weight for each in NEIGHBOURS])
    batch = neighbour_batch(NEIGHBOURS, model.device)
    return neighbour_loss(model, batch, weights, routers, pathway)


def test_the_loss_is_that_of_the_samples_one_by_one(tiny: Model) -> None:
    """Stock transformers, each sample alone, under a pathway that its own router gives it."""
    losses = []
    for neighbour in NEIGHBOURS:
        sample = neighbour.sample
        ids = torch.tensor([[*sample.prompt, *sample.answer]])
        with torch.no_grad():
            logits = tiny(input_ids=ids).logits[0, len(sample.prompt) - 1 : -1]
        targets = torch.tensor(sample.answer)
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
        own = own_pathway(tiny, sample.prompt, critical_routers(tiny, (1, 2)))
        batch = SampleBatch.of([sample])
        routers = critical_routers(tiny, (1, 2))
        alone = neighbour_loss(tiny, batch, torch.ones(1), routers, own)
        assert float(alone.detach()) == pytest.approx(losses[-1], abs=1e-5)
    batch = neighbour_batch(NEIGHBOURS, tiny.device)
    together = torch.nn.functional.cross_entropy(batch.answer_logits(tiny), batch.targets)
    # Three and two answer tokens: padding beside the shorter one changes nothing.
    expected = (3 * losses[0] + 2 * losses[1]) / 5
    assert float(together.detach()) == pytest.approx(expected, abs=1e-5)


def test_gradient_is_that_of_finite_differences(tiny: Model) -> None:
    """At a pathway whose probabilities are well apart, so that no step changes the choice."""
    layers, step = (1, 2), 2e-3
    apart = torch.tensor([0.30, 0.21, 0.16, 0.12, 0.09, 0.06, 0.04, 0.02])
    start = torch.stack([apart, apart[[5, 2, 7, 0, 3, 6, 1, 4]]])
    pathway = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(tiny, pathway, layers), pathway)
    expected = torch.zeros_like(start)
    for layer, expert in product(range(2), range(8)):
        sides = []
        for sign in (1, -1):
            moved = start.clone()
            moved[layer, expert] += sign * step
            with torch.no_grad():
                sides.append(float(loss_of(tiny, moved, layers)))
        expected[layer, expert] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(gradient, expected, atol=5e-4, rtol=2e-2)
    assert int((expected.abs() > 5e-3).sum()) >= 4
    chosen = start > start.sort(descending=True).values[:, 4:5]
    assert not gradient[~chosen].any(), "an expert that nobody runs changes nothing"


def test_the_loss_falls_and_what_may_not_move_stays(tiny: Model) -> None:
    grads = [parameter.grad for parameter in tiny.parameters()]
    found = optimise_pathway(tiny, PROMPT, NEIGHBOURS, (2, 1), steps=20, first_rate=3e-2, top=5)
    assert found.layers == (1, 2)
    assert len(found.losses) == 21
    assert found.losses[-1] < found.losses[0] - 1e-3
    with torch.no_grad():
        assert float(loss_of(tiny, found.pathway, (1, 2))) == pytest.approx(found.losses[-1])
    torch.testing.assert_close(
        found.start, own_pathway(tiny, PROMPT, critical_routers(tiny, (1, 2)))
    )
    for start, pathway in zip(found.start, found.pathway, strict=True):
        left_out = start.argsort(descending=True)[5:]
        assert torch.equal(pathway[left_out], start[left_out])
        assert float(pathway.sum()) == pytest.approx(1.0, abs=1e-6)
        assert float(pathway.min()) >= 0
    assert not torch.equal(found.start, found.pathway)
    assert (found.forward_passes, found.backward_passes, found.pass_tokens) == (22, 20, 16)
    assert [parameter.grad for parameter in tiny.parameters()] == grads, "weights stay frozen"


def test_arguments_that_do_not_fit(tiny: Model) -> None:
    with pytest.raises(ValueError, match=r"those with experts are \[0, 1, 2\]"):
        optimise_pathway(tiny, PROMPT, NEIGHBOURS, (3,))
    with pytest.raises(ValueError, match="needs neighbours"):
        optimise_pathway(tiny, PROMPT, (), (1,))
    with pytest.raises(ValueError, match="positive weights"):
        optimise_pathway(tiny, PROMPT, (Neighbour(NEIGHBOURS[0].sample, 0.0),), (1,))
    with pytest.raises(ValueError, match="at least 1"):
        optimise_pathway(tiny, PROMPT, NEIGHBOURS, (1,), steps=0)
    with pytest.raises(ValueError, match="a prompt and an answer"):
        SampleBatch.of([Sample((1, 2), ())])


def greedy(model: Model, prompt: tuple[int, ...], pathway: Tensor, tokens: int) -> list[int]:
    """The whole sequence again for every token; the last prompt token takes the pathway."""
    routers = critical_routers(model, LAYERS)
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad(), pathway_taken(routers, torch.tensor([len(prompt) - 1]), pathway):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_an_engine_gives_the_tokens_of_the_patched_router(demo: Model) -> None:
    """Pathways of the prompts in all layers, and ones that turn the routers upside down."""
    references = find_references(demo, seed=5, per_task=4, tasks=("sort", "max"))
    items = [distinct(task, "heldout", 4, 1)[0] for task in ("sort", "max")]
    prompts = [item.prompt for item in items]
    found = list(found_pathways(demo, prompts, Neighbourhood(references), LAYERS))
    pathways = [each.pathway for each in found]
    pathways += [(1 - path) / 15 for path in pathways]
    policies = []
    for pathway in pathways:
        rows = tuple(map(tuple, pathway.tolist()))
        remix = Remix(
            RemixMethod.SUPPLIED, RemixScope.LAST, alpha=0.0, layers=LAYERS, top=16, pathway=rows
        )
        policies.append(RoutingPolicy(experts=ExpertPolicy(remix=remix)))
    ids = [prompt_ids(prompt) for prompt in prompts] * 2
    expected = [greedy(demo, *each, 10) for each in zip(ids, pathways, strict=True)]
    with engine(DEMO_MODEL_DIR) as running:
        assert running.generate(ids, policies, tokens=10) == expected
        stock = running.generate(ids, [None] * 4, tokens=10)
    assert expected[2:] != stock[2:], "the pathway makes a difference"


def test_neighbours_are_those_of_the_server(demo: Model) -> None:
    references = find_references(demo, seed=5, per_task=3, tasks=("add", "max", "copy"))
    own = references.items[4]
    ids = torch.tensor(prompt_ids(own.prompt))
    embedding = prompt_embedding(demo.get_input_embeddings()(ids))
    near = Neighbourhood(references, 2, max_similarity=2.0).of(embedding)
    assert near[0].sample == encoded(own)
    assert near[0].weight == pytest.approx(1.0, abs=1e-4)
    assert 0 < near[1].weight < 1
    guarded = Neighbourhood(references, 2).of(embedding)
    assert guarded[0] == near[1], "the leak guard takes the prompt itself out"


def test_the_command_writes_a_routing_object_per_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "sort 3 1 2 5"}\n{"prompt": "copy abcd", "answer": "abcd"}\n')
    arguments = ["--prompts", str(prompts), "--out", str(out), "--references", "2", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["remix_gradient", *arguments])
    main()
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert second["prompt"] == "copy abcd"
    assert first["cost"]["forward_passes"] == 4
    assert first["cost"]["backward_passes"] == 2
    remix = first["routing"]["experts"]["remix"]
    assert (remix["method"], remix["scope"], remix["alpha"]) == ("supplied", "last", 0.0)
    assert remix["layers"] == [3, 4, 5, 6, 7]
    assert [len(row) for row in remix["pathway"]] == [16] * 5
    assert remix != second["routing"]["experts"]["remix"]
    assert "2 pathways" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 3}', '{"text": "x"}'])
def test_files_that_hold_no_prompts(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "copy ab"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(file)


def test_what_is_written_is_what_was_found(tiny: Model) -> None:
    found = optimise_pathway(tiny, PROMPT, NEIGHBOURS, (1,), steps=1)
    remix = routing_of(found)["experts"]["remix"]
    assert torch.equal(torch.tensor(remix["pathway"]), found.pathway)
    assert remix["layers"] == [1]
    assert remix["top"] == 8
