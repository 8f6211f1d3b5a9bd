"""Adapters: their loss by plain transformers, what training makes of it, and when one is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts, plain_model
from support.tiny import LAYERS, make_model

from sluice.models.depth.stream_adapter import StreamAdapter
from sluice.models.offline.calibrate.depth import training_data
from sluice.models.offline.calibrate.depth.training_data import TrainSplit
from sluice.models.offline.calibrate.recover.adapter_training import (
    KeptTraining,
    divergences,
    run_ends,
    train,
)
from sluice.models.offline.calibrate.recover.recover import Recover
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

HIDDEN = 64
STEP = Recover(shares="0.34", rank=2, steps=40, tokens=256, learning_rate=1e-2, samples=4)


def calibration(folder: Path, prompts: int = 32, **changes: Any) -> Calibration:
    """Of a random model whose embeddings share a direction, so that blocks repeat themselves.

    Without that, what a random block adds can be told from no state, and there is nothing to learn.
    """
    model = plain_model(make_model("llama", folder / "model"))
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
    model.save_pretrained(folder / "model")
    settings = {"new_tokens": 6, **changes}
    return calibration_of(folder / "model", drawn_prompts(prompts), folder / "work", **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration(tmp_path_factory.mktemp("llama"))


def drawn_adapters(layers: Sequence[int]) -> dict[int, StreamAdapter]:
    generator = torch.Generator().manual_seed(1)
    return {
        layer: StreamAdapter(
            torch.randn(2, HIDDEN, generator=generator),
            torch.randn(HIDDEN, 2, generator=generator),
        )
        for layer in layers
    }


def test_an_adapter_acts_after_each_run_of_blocks() -> None:
    assert run_ends((1, 2, 4)) == (2, 4)
    assert run_ends((5, 3, 4, 0)) == (0, 5)


@torch.no_grad()
def plain_divergences(
    model: Any, adapters: dict[int, StreamAdapter], blocks: Sequence[int], sample: Sample
) -> list[float]:
    """Layer by layer, in plain operations: generated tokens pass blocks by."""
    sequence = torch.tensor([[*sample.prompt, *sample.answer]])
    prompt, found = len(sample.prompt), []

    def leave_out(layer: int) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> Any:
            given = output.clone()
            state = inputs[0][0, prompt:-1]
            if layer in adapters:
                down, up = adapters[layer].down, adapters[layer].up
                size = (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                state = state + state / size @ down.T @ up.T
            given[0, prompt:-1] = state
            return given

        return hook

    full = model(sequence).logits[0, prompt:-1].log_softmax(-1)
    hooks = [model.model.layers[block].register_forward_hook(leave_out(block)) for block in blocks]
    own = model(sequence).logits[0, prompt:-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    for expected, given in zip(full.tolist(), own.tolist(), strict=True):
        found.append(sum(math.exp(p) * (p - q) for p, q in zip(expected, given, strict=True)))
    return found


def test_the_loss_is_the_divergence_from_full_depth(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of generated tokens alone, padded, and some of them at a time."""
    monkeypatch.setattr(training_data, "LOGITS_AT_ONCE", 5 * 256)
    blocks = (1, 2, 4)
    samples = [
        Sample(sample.prompt, sample.answer[: 2 + place % 4])
        for place, sample in enumerate(llama.samples[:5])
    ]
    plain = plain_model(llama.model.folder)
    for adapters in ({}, drawn_adapters((2, 4))):
        found = divergences(llama.model, adapters, blocks, SampleBatch.of(samples))
        expected = [
            n for sample in samples for n in plain_divergences(plain, adapters, blocks, sample)
        ]
        assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_training_makes_up_for_blocks(llama: Calibration) -> None:
    def kept(name: str) -> KeptTraining:
        return KeptTraining(llama.workspace, name, "key")

    split, blocks = TrainSplit.of(llama), (2, 3)
    adapters = train(llama, blocks, split.train, STEP.training, kept("first"))
    assert [*adapters] == [3]
    assert adapters[3].down.shape == (2, HIDDEN)
    batch = SampleBatch.of(split.test)
    before, after = (
        float(divergences(llama.model, each, blocks, batch).detach().mean())
        for each in ({}, adapters)
    )
    assert after < 0.5 * before
    again = train(llama, blocks, split.train, STEP.training, kept("second"))
    assert torch.equal(again[3].up, adapters[3].up), "the same seed, the same adapter"


def test_what_helps_is_kept_with_what_was_measured(llama: Calibration) -> None:
    part = STEP.run(llama)
    (name, found), *rest = part.fields["adapters"].items()
    assert not rest
    assert name == f"without-{round(0.34 * LAYERS)}"
    assert found["attention"] == found["mlp"]
    assert len(found["mlp"]) == 2
    assert (found["prompts"], found["held_out"]) == (16, 16)
    assert found["divergence_after"] < 0.5 * found["divergence_before"]
    assert {*part.heads} == {
        f"adapter.{name}.{layer}.{tensor}" for layer in found["layers"] for tensor in ("down", "up")
    }


def test_a_training_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """From the last step that was kept, to the adapter that it would have been."""
    of = calibration(tmp_path)
    samples = TrainSplit.of(of).train
    training = replace(STEP.training, steps=60)

    def kept(name: str) -> KeptTraining:
        return KeptTraining(of.workspace, name, "key")

    def stopped(steps: Iterable[Any], _what: str, _total: int) -> Iterable[Any]:
        for step in steps:
            if step == 31:
                raise KeyboardInterrupt
            yield step

    whole = train(of, (2, 3), samples, training, kept("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(replace(of, track=stopped), (2, 3), samples, training, kept("parts"))
    seen: list[int] = []

    def watched(steps: Iterable[Any], _what: str, _total: int) -> Iterable[Any]:
        for step in steps:
            seen.append(step)
            yield step

    going_on = replace(of, track=watched)
    parts = train(going_on, (2, 3), samples, training, kept("parts"))
    assert seen == [*range(25, 60)]
    assert torch.equal(parts[3].up, whole[3].up)
    assert torch.equal(parts[3].down, whole[3].down)
    again = train(going_on, (2, 3), samples, training, kept("parts"))
    assert len(seen) == 35, "it is done"
    assert torch.equal(again[3].up, whole[3].up)


def test_what_is_not_shown_to_help_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate at which nothing is learned."""
    of = calibration(tmp_path)
    step = Recover(shares="0.34", rank=2, steps=1, tokens=64, learning_rate=1e-30, samples=2)
    with caplog.at_level(logging.WARNING):
        part = step.run(of)
    assert part.fields["adapters"] == {}
    assert part.heads == {}
    assert "is not shown to help on 16 prompts that it was not trained on" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": "0.2,half"}, "shares are numbers with commas between them"),
        ({"shares": "0.01"}, "shares leave out 0 to 0 of 6 blocks"),
        ({"shares": "0.5,1"}, "shares leave out 3 to 6 of 6 blocks"),
        ({"shares": "nan"}, "shares are numbers"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_options_out_of_range(llama: Calibration, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"recover: {message}"):
        Recover(**options).run(llama)


def test_too_few_prompts_show_nothing(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"recover: 5 prompts .* fewer than 8 show nothing"):
        STEP.run(calibration(tmp_path, prompts=10))
