"""Re-mix references: prompts answered right, embedded and routed as transformers says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import (
    MOE_FAMILIES,
    calibration_of,
    drawn_prompts,
    example_of,
    make_biased,
    plain_model,
)
from support.tiny import make_model
from torch import Tensor, nn

from sluice.models.experts.remix import ReferenceStore
from sluice.models.offline.calibrate.experts.references import References
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.policy.experts import Remix, RemixMethod, RemixScope
from sluice.models.profile.expert_fields import ReferenceSet
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import write_profile

PROMPTS = drawn_prompts(7, seed=2)


def calibration(folder: Path, family: str) -> Calibration:
    """Examples 0, 2, 3 and 6 are answered right; 1 and 4 are not, and 5 has no answer."""
    model = make_biased(family, folder / "model")
    of = calibration_of(model, PROMPTS, folder / "work", new_tokens=4)
    answers = [" ".join(map(str, sample.answer)) for sample in of.samples]
    answers[0] = f" {answers[0]}\n"
    answers[1] += " 7"
    answers[4] = answers[4].rsplit(" ", 1)[0]
    examples = [
        example_of(ids, answer=answer, task="even" if number % 2 == 0 else "odd")
        for number, (ids, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]
    examples[5] = example_of(PROMPTS[5], task="odd")
    of.prompts = tuple(examples)
    return of


RIGHT = (0, 2, 3, 6)


def last_scores(model: Any, prompt: list[int]) -> dict[int, Tensor]:
    """Of the prompt's last token, by layer: (experts,)."""
    seen: dict[int, Tensor] = {}

    def record(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor], _output: Any) -> None:
            state = arguments[0].reshape(-1, arguments[0].shape[-1])[-1].double()
            bias = getattr(module, "bias", None)
            logits = module.weight.double() @ state
            seen[layer] = logits if bias is None else logits + bias.double()

        return hook

    handles = []
    for index, block in enumerate(model.model.layers):
        gate = getattr(block.mlp, "router", None) or getattr(block.mlp, "gate", None)
        if gate is not None:
            handles.append(gate.register_forward_hook(record(index)))
    with torch.no_grad():
        model(torch.tensor([prompt]), use_cache=False)
    for handle in handles:
        handle.remove()
    sigmoid = model.config.model_type == "deepseek_v3"
    return {
        layer: 1 / (1 + torch.exp(-logits)) if sigmoid else logits.softmax(-1)
        for layer, logits in seen.items()
    }


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_references_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    of = calibration(tmp_path, family)
    part = References().run(of)
    model = plain_model(of.model.folder)
    held = ReferenceSet.model_validate(part.fields["references"]["all"])
    embeddings, pathways = part.references["all.embeddings"], part.references["all.pathways"]
    assert embeddings.dtype == pathways.dtype == torch.float16
    assert len(embeddings) == len(pathways) == len(RIGHT)
    assert (held.width, held.encoder) == (64, "model")
    for row, place in enumerate(RIGHT):
        scores = last_scores(model, PROMPTS[place])
        assert held.layers == tuple(scores)
        expected = torch.stack(list(scores.values()))
        # Half precision has 11 bits; what was rounded differs by less than 1e-4 before.
        rounded = 2.0**-11 * expected + 1e-4
        assert bool(((pathways[row].double() - expected).abs() <= rounded).all())
        table = model.get_input_embeddings().weight.double()
        mean = sum(table[token] for token in PROMPTS[place]) / len(PROMPTS[place])
        torch.testing.assert_close(embeddings[row].double(), mean, rtol=2.0**-10, atol=1e-3)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration(tmp_path_factory.mktemp("mixtral"), "mixtral")


def test_a_set_for_each_task(mixtral: Calibration) -> None:
    whole, part = References().run(mixtral), References(by_task=True).run(mixtral)
    assert list(part.fields["references"]) == ["even", "odd"]
    pathways = whole.references["all.pathways"]
    assert torch.equal(part.references["even.pathways"], pathways[[0, 1, 3]])
    assert torch.equal(part.references["odd.pathways"], pathways[[2]])


def test_the_last_layers_alone(mixtral: Calibration) -> None:
    whole, part = References().run(mixtral), References(last_layers=2).run(mixtral)
    assert part.fields["references"]["all"]["layers"] == [4, 5]
    expected = whole.references["all.pathways"][:, 4:]
    assert torch.equal(part.references["all.pathways"], expected)


def test_no_more_than_asked_and_none_twice(mixtral: Calibration) -> None:
    whole = References().run(mixtral).references["all.embeddings"]
    some = References(most=2).run(mixtral).references["all.embeddings"]
    assert torch.equal(some, whole[:2])
    of = calibration_of(
        mixtral.model.folder, [*PROMPTS, *PROMPTS], mixtral.workspace.folder, new_tokens=4
    )
    of.prompts = mixtral.prompts * 2
    assert torch.equal(References().run(of).references["all.embeddings"], whole)


def test_end_tokens_are_no_part_of_an_answer(
    mixtral: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = mixtral.samples[1].answer[-1]
    monkeypatch.setattr(type(mixtral.model), "ends", frozenset({last}))
    of = calibration_of(mixtral.model.folder, PROMPTS[1:2], mixtral.workspace.folder, new_tokens=4)
    vars(of)["samples"] = mixtral.samples[1:2]
    text = " ".join(map(str, mixtral.samples[1].answer[:-1]))
    for answer, found in ((text, 1), (f"{text} {last}", 0)):
        of.prompts = (example_of(PROMPTS[1], answer=answer),)
        part = References().run(of)
        assert len(part.references.get("all.embeddings", ())) == found


def test_a_set_without_a_right_answer_is_left_out(
    mixtral: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    of = calibration_of(
        mixtral.model.folder, PROMPTS, mixtral.workspace.folder / "wrong", new_tokens=4
    )
    of.prompts = tuple(
        example.model_copy(update={"answer": "7"} if example.task == "odd" else {})
        for example in mixtral.prompts
    )
    with caplog.at_level(logging.WARNING):
        part = References(by_task=True).run(of)
    assert list(part.fields["references"]) == ["even"]
    assert "no set 'odd'" in caplog.text
    assert "'even'" not in caplog.text


def test_a_server_finds_what_a_profile_holds(tmp_path: Path, mixtral: Calibration) -> None:
    part = References().run(mixtral)
    model = {"layers": 6, "hidden": 64, "fingerprint": mixtral.model.fingerprint}
    write_profile(tmp_path, {"model": model, **part.fields}, {}, part.references)
    store = ReferenceStore(Profile.load(tmp_path), "all", torch.device("cpu"))
    remix = Remix(
        method=RemixMethod.KERNEL,
        scope=RemixScope.LAST,
        alpha=0.0,
        layers=(0, 1, 2, 3, 4, 5),
        top=8,
        references="all",
        neighbors=1,
        kernel="gaussian",
        bandwidth=0.5,
        max_similarity=1.0,
    )
    for row in range(len(RIGHT)):
        embedding = part.references["all.embeddings"][row].float()
        expected = part.references["all.pathways"][row].float()
        torch.testing.assert_close(store.regress(remix, embedding), expected)


def test_refusals(tmp_path: Path, mixtral: Calibration) -> None:
    of = calibration_of(mixtral.model.folder, PROMPTS, tmp_path / "work")
    assert References().refusal(of) == "no prompt has an answer to hold the model's own against"
    assert References().refusal(mixtral) is None
    make_model("llama", tmp_path / "dense")
    dense = calibration_of(tmp_path / "dense", PROMPTS, tmp_path / "other")
    dense.prompts = mixtral.prompts
    assert References().refusal(dense) == "llama has no mixture-of-experts layers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_layers": -1}, "last_layers must be at least 0"),
        ({"last_layers": 7}, "last_layers is 7, and 6 layers have"),
        ({"most": 0}, "most must be at least 1"),
    ],
)
def test_options_out_of_range(mixtral: Calibration, options: dict[str, int], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"references: {message}"):
        References(**options).run(mixtral)
