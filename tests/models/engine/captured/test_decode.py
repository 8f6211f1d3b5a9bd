"""Decode steps on static buffers against rows that run alone, with what they want and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.host_reads import HostReadError, no_host_reads
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from sluice.models.engine.captured.decode import (
    CapturedDecode,
    DecodeBuffers,
    DecodeRows,
    LayerMasks,
    Pair,
    Parts,
)
from sluice.models.engine.captured.recorders import DirectCalls, Launch, Limits
from sluice.models.offline.bench.gpu import __main__ as script
from sluice.models.offline.bench.gpu.decoder import StaticDecoder
from sluice.models.offline.bench.gpu.figures import random_masks

LAYERS, HIDDEN, CONTEXT, ROWS, POSITION = 6, 64, 16, 4, 9
NO_LIMITS = Limits(seconds=float("inf"), memory=1)


class Counted:
    """Notes what is recorded, and how often it runs."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def record(self, run: Launch) -> Launch:
        number = len(self.runs)
        self.runs.append(0)

        def counted() -> None:
            self.runs[number] += 1
            run()

        return counted


@pytest.fixture(scope="module")
def decoder() -> StaticDecoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with torch.inference_mode():
        return StaticDecoder(config, ROWS, CONTEXT, torch.float32, torch.device("cpu"))


def decode(decoder: StaticDecoder, recorder: Any = None, limits: Limits = NO_LIMITS) -> Any:
    device = torch.device("cpu")
    buffers = DecodeBuffers.allocate(LAYERS, ROWS, HIDDEN, torch.float32, device)
    return CapturedDecode(decoder.layers, buffers, recorder or DirectCalls(), limits)


def masks_of(seed: int, tokens: int) -> list[LayerMasks]:
    return random_masks(np.random.default_rng(seed), LAYERS, tokens)


def step(
    captured: CapturedDecode, masks: Sequence[LayerMasks], hidden: torch.Tensor, rows: int
) -> Pair:
    positions = torch.full((len(hidden),), POSITION)
    return captured.begin(hidden, positions, rows).all_layers(masks)


def fresh_cache(decoder: StaticDecoder, masks: Sequence[LayerMasks]) -> None:
    """What was computed before; nothing where a row does not attend."""
    generator = torch.Generator().manual_seed(1)
    for layer, mask in zip(decoder.layers, masks, strict=True):
        for cache in (layer.keys, layer.values):
            cache.copy_(torch.randn(cache.shape, generator=generator))
            for row, attends in enumerate(mask.attention):
                if not attends:
                    cache[row] = torch.nan


def alone(decoder: StaticDecoder, masks: Sequence[LayerMasks], hidden: torch.Tensor) -> Any:
    """Hidden states and caches of rows that run one after the other."""
    states = []
    for row, state in enumerate(hidden):
        state = state[None]
        for layer, mask in zip(decoder.layers, masks, strict=True):
            own = [cache[row : row + 1].clone() for cache in (layer.keys, layer.values)]
            shared, (layer.keys, layer.values) = (layer.keys, layer.values), own
            zero = torch.zeros_like(state)
            alone = DecodeRows(state, zero, torch.tensor([POSITION]), torch.tensor([True]))
            if mask.attention[row]:
                state = sum(layer.attend(alone))
            elif mask.writes[row]:
                layer.fill(alone)
            if mask.mlp[row]:
                state = sum(layer.run_mlp(state, zero))
            for cache, changed in zip(shared, own, strict=True):
                cache[row, :CONTEXT] = changed[0, :CONTEXT]
            layer.keys, layer.values = shared
        states.append(state)
    return torch.cat(states), caches(decoder)


def caches(decoder: StaticDecoder) -> list[torch.Tensor]:
    return [
        cache[:, :CONTEXT].clone()
        for layer in decoder.layers
        for cache in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("rows", range(1, ROWS + 1))
@pytest.mark.parametrize("seed", range(12))
@torch.inference_mode()
def test_random_plans(decoder: StaticDecoder, rows: int, seed: int) -> None:
    """States and K/V, with padding, over K/V that are NaN where nobody attends."""
    tokens = 1 + seed % rows
    masks = masks_of(seed, tokens)
    hidden = torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(seed))
    captured = decode(decoder)
    assert captured.capture(rows)
    fresh_cache(decoder, masks)
    expected, expected_caches = alone(decoder, masks, hidden)
    fresh_cache(decoder, masks)
    delta, residual = step(captured, masks, hidden, rows)
    torch.testing.assert_close(delta + residual, expected)
    for cache, one in zip(caches(decoder), expected_caches, strict=True):
        torch.testing.assert_close(cache, one, equal_nan=True)


@torch.inference_mode()
def test_full_depth_is_the_model(decoder: StaticDecoder) -> None:
    ids = torch.randint(0, 64, (ROWS, 7), generator=torch.Generator().manual_seed(2))
    expected = decoder.model(ids).logits
    captured = decode(decoder)
    captured.capture(ROWS)
    masks = [LayerMasks(*np.ones((3, ROWS), dtype=np.bool_))] * LAYERS
    for layer in decoder.layers:
        layer.keys.zero_()
        layer.values.zero_()
    for position in range(ids.shape[1]):
        hidden = decoder.model.model.embed_tokens(ids[:, position])
        run = captured.begin(hidden, torch.full((ROWS,), position), ROWS)
        pair = run.all_layers(masks)
        torch.testing.assert_close(decoder.logits(*pair), expected[:, position])


@torch.inference_mode()
def test_masks_that_change_on_the_way(decoder: StaticDecoder) -> None:
    """As after an exit: masks of the layers that follow come while earlier launches wait."""
    first, later = masks_of(1, 3), masks_of(2, 3)
    hidden = torch.randn((3, HIDDEN), generator=torch.Generator().manual_seed(3))
    masks = [*first[:2], *later[2:]]
    captured = decode(decoder)
    captured.capture(ROWS)
    fresh_cache(decoder, masks)
    expected, _ = alone(decoder, masks, hidden)
    fresh_cache(decoder, masks)
    run = captured.begin(hidden, torch.full((3,), POSITION), ROWS)
    run.load(0, first)
    for index, mask in enumerate(masks):
        if index == 2:
            run.load(2, later[2:])
        run.layer(index, mask.parts)
    run.settle()
    torch.testing.assert_close(sum(run.pair), expected)


@torch.inference_mode()
def test_a_launch_reads_nothing_back_and_its_addresses_stay(decoder: StaticDecoder) -> None:
    captured = decode(decoder)
    captured.capture(ROWS)
    buffers = captured.buffers
    kept = (buffers.delta, buffers.residual, buffers.positions, buffers.masks)
    addresses = [tensor.data_ptr() for tensor in kept]
    launches = len(captured)
    for seed in range(3):
        with no_host_reads():
            step(captured, masks_of(seed, 2), torch.randn((2, HIDDEN)), ROWS)
    assert [tensor.data_ptr() for tensor in kept] == addresses
    assert len(captured) == launches
    with pytest.raises(HostReadError), no_host_reads():
        bool(buffers.delta.any())


@torch.inference_mode()
def test_a_launch_needs_no_numbers(decoder: StaticDecoder) -> None:
    """It can be traced with tensors that have shapes only, and so cannot depend on content."""
    captured = decode(decoder)
    captured.capture(ROWS)
    before = captured.buffers.delta.clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for parts in Parts:
            captured.launch(parts, 0, LAYERS, ROWS)
    assert torch.equal(captured.buffers.delta, before)


@torch.inference_mode()
def test_whole_layers_go_in_few_launches(decoder: StaticDecoder) -> None:
    recorder = Counted()
    captured = decode(decoder, recorder)
    assert captured.capture(1)
    assert len(captured) == len(recorder.runs) == 4 * LAYERS + 3 + 1
    everything = LayerMasks(*np.ones((3, 1), dtype=np.bool_))
    nothing = LayerMasks(*np.zeros((3, 1), dtype=np.bool_))
    attention = nothing._replace(attention=everything.attention, writes=everything.writes)
    for masks, launches in (
        ([everything] * LAYERS, 2),  # 0-3, 4-5
        ([everything, nothing] * 3, 3),
        ([everything] * 3 + [nothing] + [everything] * 2, 3),  # 0-1, 2, 4-5
        ([nothing] * LAYERS, 0),
        ([attention] * LAYERS, LAYERS),
    ):
        before = sum(recorder.runs)
        step(captured, masks, torch.randn((1, HIDDEN)), 1)
        assert sum(recorder.runs) - before == launches


@torch.inference_mode()
def test_a_size_that_a_limit_cuts_short_is_not_there(decoder: StaticDecoder) -> None:
    captured = decode(decoder, limits=Limits(seconds=0.0, memory=1))
    assert not captured.capture(2)
    assert 2 not in captured
    assert len(captured) == 0


def test_the_script_for_a_gpu_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    options = "--shape tiny --rows 1 3 --context 16 --repeats 1"
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(out), *options.split()])
    script.main()
    figures = json.loads(out.read_text())
    assert figures["device"] == "CPU"
    assert [figures[f"{rows} rows: random plans that differ"] for rows in (1, 3)] == [0, 0]
