"""Re-mix references: samples answered right, embedded and routed as the server would."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sluice.models.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.demo.architecture import build_model, demo_config
from sluice.models.demo.references import encoded, find_references, write_references
from sluice.models.demo.tasks import TASKS, is_heldout
from sluice.models.demo.traces import Model, load_model
from sluice.models.expert_policy import Remix, RemixMethod, RemixScope
from sluice.models.experts.references import ReferenceStore
from sluice.models.experts.softmax_routers import softmax_routers
from sluice.models.profile import Profile, ProfileError
from sluice.models.profile_writer import HEADS_NAME, REFERENCES_NAME


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model(DEMO_MODEL_DIR)


def test_a_reference_is_the_prompt_that_the_server_sees(demo: Model) -> None:
    """Against the tokenizer's chat template and stock transformers, one prompt at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    references = find_references(demo, seed=3, per_task=2, tasks=("sort", "refusal"))
    assert [item.task for item in references.items] == ["sort", "sort", "refusal", "refusal"]
    assert references.layers == tuple(range(8))
    for index, item in enumerate(references.items):
        assert not is_heldout(item.prompt)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        assert tuple(ids[0].tolist()) == encoded(item).prompt
        seen: dict[int, Tensor] = {}

        def last_logits(layer: int, seen: dict[int, Tensor] = seen) -> object:
            def record(_module: nn.Module, _arguments: object, output: tuple[Tensor, ...]) -> None:
                seen[layer] = output[0][-1]

            return record

        hooks = [
            demo.model.layers[layer].mlp.gate.register_forward_hook(last_logits(layer))
            for layer in references.layers
        ]
        with torch.no_grad():
            out = demo.generate(ids, do_sample=False, max_new_tokens=48)
            seen.clear()
            demo(input_ids=ids)
        for hook in hooks:
            hook.remove()
        assert tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True) == item.answer
        pathway = torch.stack([seen[layer].softmax(-1) for layer in references.layers])
        torch.testing.assert_close(references.pathways[index], pathway, atol=1e-5, rtol=0)
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


def test_references_join_a_profile_that_stays_as_it_is(tmp_path: Path, demo: Model) -> None:
    with pytest.raises(ProfileError):
        write_references(tmp_path, find_references(demo, 1, 1, tasks=("copy",)))
    for path in DEMO_PROFILE_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = find_references(demo, seed=1, per_task=3, last_layers=2, tasks=("copy",))
    profile = write_references(tmp_path, found, name="few")
    assert list(profile.references) == ["few"]
    assert profile.references["few"].layers == (6, 7)
    assert (tmp_path / HEADS_NAME).read_bytes() == (DEMO_PROFILE_DIR / HEADS_NAME).read_bytes()
    assert profile.importance == Profile.load(DEMO_PROFILE_DIR).importance
    tensors = profile.reference_tensors("few")
    torch.testing.assert_close(tensors["pathways"].float(), found.pathways, atol=1e-3, rtol=0)


def test_shipped_references_fit_the_demo_model(demo: Model) -> None:
    shipped = Profile.load(DEMO_PROFILE_DIR)
    assert list(shipped.references) == ["tasks"]
    held = shipped.references["tasks"]
    assert held.encoder == "model"
    assert held.width == demo.config.hidden_size
    assert held.layers == tuple(softmax_routers(demo))
    tensors = load_file(DEMO_PROFILE_DIR / REFERENCES_NAME)
    count = len(tensors["tasks.embeddings"])
    assert count == 100 * len(TASKS)
    assert tuple(tensors["tasks.pathways"].shape) == (count, 8, demo.config.num_experts)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    sums = tensors["tasks.pathways"].float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-3, rtol=0)
    assert (DEMO_PROFILE_DIR / REFERENCES_NAME).stat().st_size < 1_000_000


def test_shipped_references_are_made_again(demo: Model) -> None:
    """The first ones of a task, from the seed that the README names."""
    again = find_references(demo, seed=5, per_task=3, tasks=("copy", "facts"))
    tensors = Profile.load(DEMO_PROFILE_DIR).reference_tensors("tasks")
    for place, task in enumerate(("copy", "facts")):
        start = 100 * TASKS.index(task)
        shipped, made = tensors["pathways"][start].float(), again.pathways[3 * place]
        torch.testing.assert_close(shipped, made, atol=1e-3, rtol=0)


def test_the_nearest_reference_of_a_sample_is_itself(demo: Model) -> None:
    """What the server retrieves for a reference's own prompt, once the leak guard lets it."""
    found = find_references(demo, seed=5, per_task=3, tasks=("lookup",))
    store = ReferenceStore(Profile.load(DEMO_PROFILE_DIR), "tasks", torch.device("cpu"))
    remix = Remix(
        method=RemixMethod.KERNEL,
        scope=RemixScope.LAST,
        alpha=0.0,
        layers=found.layers,
        top=16,
        references="tasks",
        neighbors=1,
        kernel="gaussian",
        bandwidth=0.5,
        max_similarity=1.0,
    )
    # Rounded to fp16, a prompt may seem a little more than equal to itself.
    regressed = store.regress(remix, found.embeddings[0] * (1 - 1e-4))
    torch.testing.assert_close(regressed, found.pathways[0], atol=1e-3, rtol=0)


def test_families_that_route_otherwise_are_refused() -> None:
    tiny = build_model(demo_config(layers=1, hidden=64, experts=8), seed=1)
    tiny.config.model_type = "deepseek_v3"
    with pytest.raises(ValueError, match="'deepseek_v3' is none of mixtral"):
        softmax_routers(tiny)
