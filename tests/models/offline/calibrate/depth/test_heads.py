"""Exit heads: what they learn from, by transformers one text at a time, and what they learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts, plain_model
from support.tiny import FAMILIES, LAYERS, make_model
from torch import Tensor

from sluice.models.depth.method import ExitPoint
from sluice.models.depth.registry import token_exits
from sluice.models.offline.calibrate.depth import training_data as head_rows
from sluice.models.offline.calibrate.depth.heads import (
    ExitData,
    Heads,
    log_exit_shares,
    train_classifier,
    train_q_exit,
)
from sluice.models.offline.calibrate.depth.training_data import (
    TokenStates,
    TrainSplit,
    decode_steps,
)
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import Sample

QUICK = Heads(steps=60, rows=64, inner=8)


def calibration(folder: Path, family: str = "llama", **changes: Any) -> Calibration:
    make_model(family, folder / "model")
    settings = {"new_tokens": 5, **changes}
    return calibration_of(folder / "model", drawn_prompts(24), folder / "work", **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(llama: Calibration) -> ExitData:
    tokens = TokenStates.of(llama, TrainSplit.of(llama).train, 1000, 0)
    return ExitData.of(llama.model, tokens)


def plainly(model: Any, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sample's decode steps: states, (layers, steps, hidden), without the last layer's, and
    losses and agreement, (steps, layers)."""
    whole = torch.tensor([[*sample.prompt, *sample.answer[:-1]]])
    with torch.no_grad():
        out = model(whole, output_hidden_states=True, use_cache=False)
        states = torch.stack([state[0, len(sample.prompt) :] for state in out.hidden_states[:-1]])
        exits = [model.lm_head(model.model.norm(state)) for state in states[1:]]
    exits.append(out.logits[0, len(sample.prompt) :])
    losses, agrees = [], []
    for step, token in enumerate(exits[-1].argmax(-1).tolist()):
        losses.append([-float(logits[step].double().log_softmax(-1)[token]) for logits in exits])
        agrees.append([int(logits[step].argmax()) == token for logits in exits])
    return states, torch.tensor(losses), torch.tensor(agrees)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_heads_learn_from_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    of = calibration(tmp_path, family)
    train = TrainSplit.of(of).train
    tokens = TokenStates.of(of, train, 1000, 0)
    found = ExitData.of(of.model, tokens)
    assert tokens.states.shape == (LAYERS + 1, sum(map(decode_steps, train)), 64)
    model = plain_model(of.model.folder)
    for place, sample in enumerate(train):
        mine = tokens.owner == place
        states, losses, agrees = plainly(model, sample)
        scale = float(states.abs().max())
        torch.testing.assert_close(tokens.states[:-1, mine], states, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(found.losses[mine], losses, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.agrees[mine], agrees)
        assert found.agrees[mine, -1].all()
    assert not found.agrees.all()


def test_a_bounded_sample_of_tokens(llama: Calibration) -> None:
    # Answers of unlike lengths.
    train = tuple(
        Sample(sample.prompt, sample.answer[: 2 + place % 4])
        for place, sample in enumerate(TrainSplit.of(llama).train)
    )
    whole = TokenStates.of(llama, train, 1000, 0)
    some = TokenStates.of(llama, train, 10, 0)
    assert some.states.size(1) == len(some.owner) == len(some.weights) == 10
    for place in range(10):
        same = (whole.states == some.states[:, place : place + 1]).all(-1).all(0)
        assert torch.equal(whole.owner[same], some.owner[place : place + 1])
    again, other = (TokenStates.of(llama, train, 10, seed) for seed in (0, 1))
    assert torch.equal(again.states, some.states)
    assert not torch.equal(other.owner, some.owner)
    # All of a sample's tokens weigh as much as those of any other.
    weights = torch.bincount(whole.owner, weights=whole.weights.double())
    torch.testing.assert_close(weights, torch.full_like(weights, weights[0]), rtol=1e-6, atol=0)
    assert float(whole.weights.mean()) == pytest.approx(1.0)


def test_a_large_vocabulary_is_read_in_parts(
    llama: Calibration, data: ExitData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_rows, "LOGITS_AT_ONCE", 3 * 256 + 1)
    tokens = TokenStates.of(llama, TrainSplit.of(llama).train, 1000, 0)
    widest = 0
    logits = type(llama.model).logits

    def watched(self: Any, states: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, len(states))
        return logits(self, states)

    monkeypatch.setattr(type(llama.model), "logits", watched)
    parts = ExitData.of(llama.model, tokens)
    assert widest == 3
    torch.testing.assert_close(parts.losses, data.losses)
    assert torch.equal(parts.agrees, data.agrees)


def scores(data: ExitData, heads: dict[str, Tensor]) -> Tensor:
    """Logits of the classifier, (tokens, layers - 1), on states as they are."""
    found = data.states[1:-1] @ heads["classifier.weight"] + heads["classifier.bias"]
    return found.T


def halting(data: ExitData, heads: dict[str, Tensor]) -> Tensor:
    """Logits of the halting head, (tokens, layers - 1), on states as they are."""
    x = torch.cat([data.states[1:-1], data.states[:-2]], dim=-1)
    for part in range(3):
        x = x @ heads[f"q_exit.{part}.weight"].T + heads[f"q_exit.{part}.bias"]
        x = x.tanh() if part < 2 else x
    return x.squeeze(-1).T


def test_the_classifier_learns_where_tokens_are_settled(llama: Calibration, data: ExitData) -> None:
    heads = dict(Heads(steps=300, rows=64, inner=8).run(llama).heads)
    right = data.agrees[:, :-1].double()
    found = torch.nn.functional.binary_cross_entropy_with_logits(scores(data, heads), right)
    share = float(right.mean())
    constant = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found < 0.7 * constant


def test_with_much_beta_the_halting_head_follows_its_prior(
    llama: Calibration, data: ExitData
) -> None:
    step = Heads(steps=300, rows=64, inner=8, prior=0.2, beta=1e3)
    heads = dict(step.run(llama).heads)
    assert float(halting(data, heads).sigmoid().mean()) == pytest.approx(0.2, abs=0.02)


def test_with_no_beta_the_halting_head_minds_losses_alone(
    llama: Calibration, data: ExitData
) -> None:
    heads = dict(Heads(steps=300, rows=64, inner=8, beta=0.0).run(llama).heads)
    expected = (log_exit_shares(halting(data, heads)).exp() * data.losses).sum(1).mean()
    # No exit of this model is as good as the last layer.
    assert expected < data.losses[:, :-1].mean(0).min()


def test_heads_say_the_same_of_a_stretched_stream(llama: Calibration, data: ExitData) -> None:
    """Training sees it standardised, and the heads take it as it is."""
    generator = torch.Generator().manual_seed(1)
    factor = 0.1 + 10.0 * torch.rand(64, generator=generator)
    shift = torch.randn(64, generator=generator)
    stretched = replace(
        data,
        states=data.states * factor + shift,
        mean=data.mean * factor + shift,
        mean_before=data.mean_before * factor + shift,
        scale=data.scale * factor,
        scale_before=data.scale_before * factor,
    )
    found = []
    for each in (data, stretched):
        classifier = train_classifier(each, QUICK, llama)
        heads = {f"classifier.{name}": tensor for name, tensor in classifier.items()}
        heads |= {f"q_exit.{n}": t for n, t in train_q_exit(each, QUICK, llama).items()}
        found.append(torch.cat([scores(each, heads), halting(each, heads)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)


def test_states_are_standardised(data: ExitData) -> None:
    rows = torch.arange(len(data.weights))
    for part in data.around(rows).flatten(0, 1).split(64, dim=1):
        torch.testing.assert_close(part.mean(0), torch.zeros(64), rtol=0, atol=1e-4)
        torch.testing.assert_close(part.std(0, correction=0), torch.ones(64), rtol=1e-3, atol=0)


def test_shares_of_exits() -> None:
    halting = torch.tensor([[0.3, -1.0, 2.0], [50.0, 0.0, 0.0]])
    found = log_exit_shares(halting).exp()
    left = 1.0
    for place, logit in enumerate(halting[0].tolist()):
        chance = 1 / (1 + math.exp(-logit))
        assert float(found[0, place]) == pytest.approx(left * chance, rel=1e-5)
        left *= 1 - chance
    assert float(found[0, 3]) == pytest.approx(left, rel=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_methods_take_the_heads(llama: Calibration, data: ExitData) -> None:
    heads = dict(QUICK.run(llama).heads)
    assert all(tensor.dtype == torch.float32 for tensor in heads.values())
    for name, expected in (
        ("classifier", scores(data, heads)[:, 2].sigmoid()),
        ("q_exit", halting(data, heads)[:, 2].sigmoid()),
    ):
        method = token_exits()[name]
        tensors = {part: heads.pop(f"{name}.{part}") for part in method.profile_tensors}
        for threshold in (0.99 * expected, 1.01 * expected):
            point = ExitPoint(
                2, data.states[3], data.states[2], None, threshold.float(), {}, tensors
            )
            assert torch.equal(method.leaves(point), threshold < expected), name
    assert not heads


def test_one_seed_trains_one_pair_of_heads(llama: Calibration) -> None:
    first, again = QUICK.run(llama).heads, QUICK.run(llama).heads
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    llama.seed = 1
    try:
        other = QUICK.run(llama).heads
    finally:
        llama.seed = 0
    assert float((other["q_exit.0.weight"] - first["q_exit.0.weight"]).abs().max()) > 1e-3


def test_training_leaves_the_global_generator_alone(llama: Calibration) -> None:
    state = torch.get_rng_state()
    QUICK.run(llama)
    assert torch.equal(torch.get_rng_state(), state)


def test_held_prompts_are_not_read(llama: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    batches = type(llama.model).batches

    def watched(self: Any, samples: Any, **more: Any) -> Any:
        seen.update(sample.prompt for sample in samples)
        return batches(self, samples, **more)

    monkeypatch.setattr(type(llama.model), "batches", watched)
    QUICK.run(llama)
    split = TrainSplit.of(llama)
    assert seen == {sample.prompt for sample in split.train}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 1),
        ("steps", 0),
        ("rows", 0),
        ("inner", 0),
        ("prior", 0.0),
        ("prior", 1.0),
        ("beta", -0.1),
        ("learning_rate", 0.0),
    ],
)
def test_options_out_of_range(llama: Calibration, name: str, value: float) -> None:
    with pytest.raises(CalibrationError, match=f"heads: {name} must"):
        Heads(**{name: value}).run(llama)


def test_refusals(tmp_path: Path) -> None:
    of = calibration(tmp_path, new_tokens=1)
    with pytest.raises(CalibrationError, match="no answer has a second token"):
        QUICK.run(of)
    assert QUICK.refusal(of) is None
    make_model("llama", tmp_path / "flat", num_hidden_layers=1)
    flat = calibration_of(tmp_path / "flat", drawn_prompts(2), tmp_path / "other")
    assert QUICK.refusal(flat) == "a model of one layer has no exits"
