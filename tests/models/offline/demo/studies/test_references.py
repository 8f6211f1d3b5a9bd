"""Samples answered right, embedded as the server would, and the shipped re-mix references."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sluice.models.experts.remix import ReferenceStore
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.offline.demo.calibration import draw
from sluice.models.offline.demo.studies.references import encoded, find_references
from sluice.models.offline.demo.tasks.tasks import TASKS, is_heldout
from sluice.models.offline.demo.training.model import Model, build_model, demo_config, load_model
from sluice.models.offline.hf_model.moe import recorded_scores, softmax_routers
from sluice.models.offline.hf_model.samples import SampleBatch
from sluice.models.policy.experts import Remix, RemixMethod, RemixScope
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import REFERENCES_NAME

EVERY = tuple(range(8))


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(DEMO_MODEL_DIR)


def test_a_reference_is_the_prompt_that_the_server_sees(demo: Model) -> None:
    """Against the tokenizer's chat template and stock transformers, one prompt at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    references = find_references(demo, seed=3, per_task=2, tasks=("sort", "refusal"))
    assert [item.task for item in references.items] == ["sort", "sort", "refusal", "refusal"]
    for index, item in enumerate(references.items):
        assert not is_heldout(item.prompt)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        assert tuple(ids[0].tolist()) == encoded(item).prompt
        with torch.no_grad():
            out = demo.generate(ids, do_sample=False, max_new_tokens=48)
        assert tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True) == item.answer
        mean = demo.get_input_embeddings()(ids[0]).mean(0)
        torch.testing.assert_close(references.embeddings[index], mean, atol=1e-6, rtol=0)


def test_a_wrong_answer_is_no_reference(demo: Model) -> None:
    found = find_references(demo, seed=1, per_task=4, tasks=("copy",))
    wrong = found.items[1].prompt

    class Mistaken(nn.Module):
        """The demo model, but for one prompt, to which it gives another answer."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.model = demo.config, demo.model

        def get_input_embeddings(self) -> nn.Module:
            embeddings: nn.Module = demo.get_input_embeddings()
            return embeddings

        def forward(self, input_ids: Tensor, use_cache: bool) -> object:
            out = demo(input_ids=input_ids, use_cache=use_cache)
            marked = torch.tensor(encoded(found.items[1]).prompt)
            rows = (input_ids[:, : len(marked)] == marked).all(1)
            assert int(rows.sum()) == 1
            out.logits[rows] = out.logits[rows].flip(-1)
            return out

    kept = find_references(Mistaken(), seed=1, per_task=4, tasks=("copy",))
    assert wrong not in {item.prompt for item in kept.items}
    assert kept.items[0] == found.items[0]
    with pytest.raises(ValueError, match="task 'copy': 4 right answers, 5 wanted"):
        find_references(Mistaken(), seed=1, per_task=5, tasks=("copy",), spare=1.0)


def test_shipped_references_fit_the_demo_model(demo: Model) -> None:
    shipped = Profile.load(DEMO_PROFILE_DIR)
    assert list(shipped.references) == ["all"]
    held = shipped.references["all"]
    assert held.encoder == "model"
    assert held.width == demo.config.hidden_size
    assert held.layers == tuple(softmax_routers(demo)) == EVERY
    tensors = load_file(DEMO_PROFILE_DIR / REFERENCES_NAME)
    count = len(tensors["all.embeddings"])
    assert count == 1000
    assert tuple(tensors["all.pathways"].shape) == (count, 8, demo.config.num_experts)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    sums = tensors["all.pathways"].float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-3, rtol=0)
    assert (DEMO_PROFILE_DIR / REFERENCES_NAME).stat().st_size < 1_000_000


@torch.no_grad()
def test_the_nearest_shipped_reference_of_a_prompt_is_itself(demo: Model) -> None:
    """What the server retrieves for a reference's own prompt, once the leak guard lets it.

    Of one prompt of every task that the shipped profile was made from.
    """
    prompts, _ = draw(5, 125, 40)
    first = [encoded(item) for item in prompts[: len(TASKS)]]
    store = ReferenceStore(Profile.load(DEMO_PROFILE_DIR), "all", torch.device("cpu"))
    remix = Remix(
        method=RemixMethod.KERNEL,
        scope=RemixScope.LAST,
        alpha=0.0,
        layers=EVERY,
        top=16,
        references="all",
        neighbors=1,
        kernel="gaussian",
        bandwidth=0.5,
        max_similarity=1.0,
    )
    for sample in first:
        batch = SampleBatch.of([sample])
        with recorded_scores(softmax_routers(demo)) as scores:
            batch.answer_logits(demo)
        pathway = torch.stack([scores[layer][batch.last[0]] for layer in EVERY])
        embedding = demo.get_input_embeddings()(torch.tensor(sample.prompt)).mean(0)
        # Rounded to fp16, a prompt may seem a little more than equal to itself.
        regressed = store.regress(remix, embedding * (1 - 1e-4))
        torch.testing.assert_close(regressed, pathway, atol=1e-3, rtol=0)


def test_families_that_route_otherwise_are_refused() -> None:
    tiny = build_model(demo_config(layers=1, hidden=64, experts=8), seed=1)
    tiny.config.model_type = "deepseek_v3"
    with pytest.raises(ValueError, match="'deepseek_v3' is none of mixtral"):
        softmax_routers(tiny)
