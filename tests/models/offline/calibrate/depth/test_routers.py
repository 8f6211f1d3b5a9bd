"""FiRST's routers: their loss by plain transformers, and what training makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibration import calibration_of, drawn_prompts, plain_model
from support.tiny import FAMILIES, LAYERS, make_model
from torch import Tensor

from sluice.models.depth.registry import adaptive_methods
from sluice.models.offline.calibrate.depth import training_data as head_rows
from sluice.models.offline.calibrate.depth.routers import (
    REACH,
    BlockRouters,
    Routers,
    pooled_inputs,
    prompt_means,
    router_loss,
)
from sluice.models.offline.calibrate.depth.training_data import TrainSplit
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.policy import AdaptiveRule

HIDDEN = 64


def calibration(folder: Path, family: str = "llama", **changes: Any) -> Calibration:
    make_model(family, folder / "model")
    settings = {"new_tokens": 5, **changes}
    return calibration_of(folder / "model", drawn_prompts(16), folder / "work", **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration(tmp_path_factory.mktemp("llama"))


def some_samples(of: Calibration) -> list[Sample]:
    """With answers of unlike lengths."""
    return [
        Sample(sample.prompt, sample.answer[: 2 + place % 4])
        for place, sample in enumerate(of.samples[:6])
    ]


def drawn_routers(of: Calibration) -> BlockRouters:
    """Routers that decide now one way, now the other."""
    routers = BlockRouters(*pooled_inputs(of, of.samples))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        routers.weight.copy_(torch.randn(routers.weight.shape, generator=generator))
        routers.bias.copy_(torch.randn(routers.bias.shape, generator=generator))
    return routers


def gate(routers: BlockRouters, layer: int, prompt: Tensor, sharpness: float) -> float:
    """rho of one prompt, whose states are (tokens, hidden), from the routers as they are served."""
    tensors = routers.tensors()
    logit = float(prompt.mean(0) @ tensors["weight"][layer] + tensors["bias"][layer])
    return 1 / (1 + math.exp(-sharpness * logit))


@torch.no_grad()
def plain_loss(
    model: Any, routers: BlockRouters, samples: list[Sample], sharpness: float, cost: float
) -> float:
    """One sample after the other."""
    total = 0.0
    for sample in samples:
        start, gates = len(sample.prompt), []

        def hook(
            layer: int,
            arguments: Any,
            output: Any,
            start: int = start,
            gates: list[float] = gates,
        ) -> Any:
            before, after = arguments[0][0], output[0] if isinstance(output, tuple) else output
            rho = gate(routers, layer, before[:start], sharpness)
            gates.append(rho)
            mixed = after.clone()
            mixed[0, start:] = (1 - rho) * before[start:] + rho * after[0, start:]
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        handles = [
            block.register_forward_hook(
                lambda _m, arguments, output, layer=layer: hook(layer, arguments, output)
            )
            for layer, block in enumerate(model.model.layers)
        ]
        whole = torch.tensor([[*sample.prompt, *sample.answer[:-1]]])
        logits = model(whole, use_cache=False).logits[0, start:]
        for handle in handles:
            handle.remove()
        losses = [
            -float(row.double().log_softmax(-1)[token])
            for row, token in zip(logits, sample.answer[1:], strict=True)
        ]
        total += sum(losses) / len(losses) + cost * sum(gates)
    return total / len(samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    of = calibration(tmp_path, family)
    samples, routers = some_samples(of), drawn_routers(of)
    batch = SampleBatch.of(samples, of.model.device)
    found = router_loss(of.model, routers, batch, 2.0, 0.3)
    expected = plain_loss(plain_model(of.model.folder), routers, samples, 2.0, 0.3)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert float(routers.bias.grad.abs().min()) > 0
    assert all(parameter.grad is None for parameter in of.model.causal_lm.parameters())


def test_the_gradient_is_that_of_small_steps(llama: Calibration) -> None:
    batch = SampleBatch.of(some_samples(llama), llama.model.device)
    routers = drawn_routers(llama)
    router_loss(llama.model, routers, batch, 2.0, 0.3).backward()
    for layer in range(LAYERS):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                routers.bias[layer] += step
                losses.append(float(router_loss(llama.model, routers, batch, 2.0, 0.3)))
                routers.bias[layer] -= step
        slope = (losses[0] - losses[1]) / 2e-2
        assert float(routers.bias.grad[layer]) == pytest.approx(slope, rel=0.05, abs=2e-3), layer


def test_a_large_vocabulary_is_read_in_parts(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, found = SampleBatch.of(some_samples(llama), llama.model.device), []
    for size in (1 << 24, 3 * 256):
        monkeypatch.setattr(head_rows, "LOGITS_AT_ONCE", size)
        routers = drawn_routers(llama)
        loss = router_loss(llama.model, routers, batch, 2.0, 0.3)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], routers.bias.grad]))
    torch.testing.assert_close(found[0], found[1])


def test_what_routers_read_is_standardised(llama: Calibration) -> None:
    mean, spread = pooled_inputs(llama, llama.samples)
    model, pooled = plain_model(llama.model.folder), []
    for sample in llama.samples:
        with torch.no_grad():
            out = model(torch.tensor([sample.prompt]), output_hidden_states=True)
        pooled.append(torch.stack([state[0].double().mean(0) for state in out.hidden_states[:-1]]))
    whole = torch.stack(pooled)
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-4, atol=1e-4)
    expected = whole.std(0, correction=0)
    torch.testing.assert_close(spread.double(), expected, rtol=1e-3, atol=1e-4)


def test_what_never_varies_is_not_divided_by(llama: Calibration) -> None:
    same = [llama.samples[0]] * 3
    _, spread = pooled_inputs(llama, same)
    assert float(spread.min()) > 0
    assert BlockRouters(*pooled_inputs(llama, same)).tensors()["weight"].isfinite().all()


def test_the_method_decides_as_the_routers_do(llama: Calibration) -> None:
    routers, first = drawn_routers(llama), adaptive_methods()["first"]
    tensors = routers.tensors()
    assert {name: tuple(each.shape) for name, each in tensors.items()} == {
        "weight": (LAYERS, HIDDEN),
        "bias": (LAYERS,),
    }
    batch = SampleBatch.of(some_samples(llama), llama.model.device)
    logits, pooled = [], []

    def look(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> None:
        logits.append(routers.logit(layer, prompt_means(before, batch)))
        rows = before[0][batch.prompts[0]]
        pooled.append(float(first.statistic(layer, rows, rows, tensors).mean()))

    with torch.no_grad():
        final_states(llama.model, batch, look)
    rule = AdaptiveRule("first", threshold=0.5)
    skipped = first.skipped_blocks(np.array(pooled), rule)
    assert skipped.tolist() == [float(each[0]) < 0 for each in logits]
    assert 0 < skipped.sum() < LAYERS


def kept(of: Calibration, heads: Any) -> float:
    """Share of blocks that the prompts of the first half keep."""
    train = TrainSplit.of(of).train
    batch, found = SampleBatch.of(train, of.model.device), []

    def look(layer: int, before: Tensor, _middle: Tensor, _after: Tensor) -> None:
        logits = prompt_means(before, batch) @ heads["first.weight"][layer]
        found.append(logits + heads["first.bias"][layer] >= 0)

    with torch.no_grad():
        final_states(of.model, batch, look)
    return float(torch.stack(found).float().mean())


def test_dear_blocks_are_left_out_and_free_ones_kept(llama: Calibration) -> None:
    dear, free = (
        kept(llama, Routers(steps=40, tokens=80, cost=cost, sharpness=1.0).run(llama).heads)
        for cost in (1000.0, 0.0)
    )
    assert dear < 0.15
    assert free > dear + 0.4


def test_training_lowers_the_loss(llama: Calibration) -> None:
    batch = SampleBatch.of(TrainSplit.of(llama).train, llama.model.device)
    # Above what a block is worth to this model on the average.
    step = Routers(steps=60, tokens=160, cost=1.0, sharpness=4.0)
    before = BlockRouters(*pooled_inputs(llama, TrainSplit.of(llama).train))
    after = BlockRouters(torch.zeros(LAYERS, HIDDEN), torch.full((LAYERS, HIDDEN), REACH / HIDDEN))
    heads = step.run(llama).heads
    with torch.no_grad():
        after.weight.copy_(heads["first.weight"])
        after.bias.copy_(heads["first.bias"])
        losses = [router_loss(llama.model, each, batch, 4.0, 1.0) for each in (before, after)]
    assert losses[1] < losses[0] - 0.2


def test_one_seed_trains_one_set_of_routers(llama: Calibration) -> None:
    step = Routers(steps=3, tokens=60)
    first, again = step.run(llama).heads, step.run(llama).heads
    assert set(first) == {"first.weight", "first.bias"}
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6)
    llama.seed = 1
    try:
        other = step.run(llama).heads
    finally:
        llama.seed = 0
    assert float((other["first.weight"] - first["first.weight"]).abs().max()) > 1e-3


def test_steps_take_as_many_samples_as_fit(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, prompts = [], []
    of = SampleBatch.of

    def watched(samples: Any, device: Any) -> SampleBatch:
        batch = of(samples, device)
        shapes.append(tuple(batch.ids.shape))
        prompts.append([sample.prompt for sample in samples])
        return batch

    train = TrainSplit.of(llama).train
    longest = max(len(sample.prompt) + len(sample.answer) for sample in train)
    inputs = pooled_inputs(llama, train)
    monkeypatch.setattr(
        "sluice.models.offline.calibrate.depth.routers.pooled_inputs", lambda *_: inputs
    )
    monkeypatch.setattr(SampleBatch, "of", watched)
    Routers(steps=12, tokens=2 * longest).run(llama)
    assert all(rows * width <= 2 * longest for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 1
    # Once round before any comes again, and nothing but the first half.
    flat = [prompt for each in prompts for prompt in each]
    assert len(set(flat[: len(train)])) == len(train) == len(set(flat))
    shapes.clear()
    Routers(steps=2, tokens=1).run(llama)
    assert [rows for rows, _ in shapes] == [1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("tokens", 0),
        ("sharpness", 0.5),
        ("cost", -1.0),
        ("weight_decay", -1.0),
        ("learning_rate", 0.0),
    ],
)
def test_options_out_of_range(llama: Calibration, name: str, value: float) -> None:
    with pytest.raises(CalibrationError, match=f"routers: {name} must"):
        Routers(**{name: value}).run(llama)


def test_too_few_answers(tmp_path: Path) -> None:
    of = calibration(tmp_path, new_tokens=1)
    with pytest.raises(CalibrationError, match="two prompts or more"):
        Routers().run(of)
