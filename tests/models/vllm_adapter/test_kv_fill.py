"""What filling writes is what the attention itself would write of the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.engine import Engine, engine
from support.tiny import make_model
from torch import nn

from sluice.models.vllm_adapter.decoder import DecoderLayer
from sluice.models.vllm_adapter.key_values import KeyValues
from sluice.models.vllm_adapter.kv_fill import fill_keys_values, paged_cache
from sluice.models.vllm_adapter.patching import SeamMovedError

FAMILIES = {
    "llama": "nothing but a projection",
    "qwen2": "a bias",
    "qwen3": "a norm of each head",
    "olmoe": "a norm across heads",
    "gpt_oss": "a bias, and YaRN",
}
HIDDEN = 64
BLOCK, BLOCKS = 4, 6


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, models_folder: Path) -> Iterator[tuple[Engine, Path]]:
    folder = make_model(request.param, models_folder / f"fill-{request.param}")
    with engine(folder) as running:
        yield running, folder


def rows(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and normed hidden states."""
    generator = torch.Generator().manual_seed(count)
    return torch.arange(count) * 11, torch.randn(count, HIDDEN, generator=generator)


def written(
    layer: DecoderLayer, count: int, patch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that come to the cache, (rows, kv_heads, head_size) each."""
    kept: list[torch.Tensor] = []

    def keep(op: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        sizes = (op.head_size, op.head_size_v)
        states = zip((key, value), sizes, strict=True)
        kept.extend(state.clone().view(count, op.num_kv_heads, size) for state, size in states)

    patch.setattr("sluice.models.vllm_adapter.kv_fill.write_keys_values", keep)
    with torch.inference_mode():
        fill_keys_values(layer, *rows(count))
    key, value = kept
    return key, value


def through_attention(layer: DecoderLayer) -> DecoderLayer:
    """The same layer, filled by running its attention up to the attending."""
    return replace(layer, key_values=None)


@pytest.mark.parametrize("count", [1, 7, 33])
def test_equals_what_the_attention_writes(
    served: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for layer in served[0].runner.routed.stack.layers:
        assert layer.key_values is not None
        found = written(layer, count, monkeypatch)
        expected = written(through_attention(layer), count, monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_the_checkpoint(served: tuple[Engine, Path]) -> None:
    running, folder = served
    weights = load_file(folder / "model.safetensors")
    for index, layer in enumerate(running.runner.routed.stack.layers):
        (projection,) = layer.fill_projections
        with torch.inference_mode():
            held = projection.quant_method.apply(projection, torch.eye(HIDDEN), None).t()
        names = [f"model.layers.{index}.self_attn.{part}_proj.weight" for part in "kv"]
        assert torch.equal(held, torch.cat([weights[name] for name in names]))


def test_filling_costs_the_rows_of_keys_and_values(served: tuple[Engine, Path]) -> None:
    runner = served[0].runner
    for layer, fill in zip(runner.routed.stack.layers, runner.routed.cost.fill, strict=True):
        op = layer.attention_op
        assert fill == HIDDEN * op.num_kv_heads * 2 * op.head_size


class FlashOp(nn.Module):
    """As much of an attention of vLLM's on CUDA as filling looks at."""

    def __init__(self, op: Any, name: str = "FLASH_ATTN", dtype: str = "auto") -> None:
        super().__init__()
        self.layer_name, self.num_kv_heads = op.layer_name, op.num_kv_heads
        self.head_size, self.head_size_v = op.head_size, op.head_size_v
        self.attn_backend = SimpleNamespace(get_name=lambda: name)
        self.kv_cache_dtype = dtype
        shape = (BLOCKS, op.num_kv_heads, BLOCK, op.head_size + op.head_size_v)
        self.kv_cache = torch.full(shape, torch.nan)


def test_paged_caches_get_the_same(
    served: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of CUDA, with the operation's reference and vLLM's layout."""
    slots = torch.tensor([17, -1, 0, 5, 23, 9, 4])
    for layer in served[0].runner.routed.stack.layers:
        op = FlashOp(layer.attention_op)
        context = SimpleNamespace(slot_mapping={op.layer_name: slots})
        monkeypatch.setattr(
            "sluice.models.vllm_adapter.kv_fill.get_forward_context", lambda c=context: c
        )
        keys, values = written(through_attention(layer), len(slots), monkeypatch)
        with torch.inference_mode():
            fill_keys_values(replace(layer, attention_op=op), *rows(len(slots)))
        stored = op.kv_cache.transpose(1, 2).flatten(0, 1)
        owned = slots[slots >= 0]
        expected = torch.cat([keys, values], dim=-1)[slots >= 0]
        torch.testing.assert_close(stored[owned], expected, rtol=1e-5, atol=1e-5)
        assert int(stored.isnan().all(-1).all(-1).sum()) == BLOCK * BLOCKS - len(owned)


def test_other_caches_are_left_to_vllm(served: tuple[Engine, Path]) -> None:
    op = served[0].runner.routed.stack.layers[0].attention_op
    assert paged_cache(op) is None
    assert paged_cache(FlashOp(op, "FLASHINFER")) is None
    assert paged_cache(FlashOp(op, dtype="fp8")) is None


def test_what_only_the_attention_knows_is_left_to_it(
    served: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention: Any = served[0].runner.routed.stack.layers[0].attention
    with pytest.raises(SeamMovedError, match="rows of a packed weight"):
        KeyValues.from_attention(attention)
    packed = attention.qkv_proj
    rows = torch.zeros(2 * packed.num_kv_heads * packed.head_size, packed.input_size)
    packed._sluice_key_value_rows = rows
    assert KeyValues.from_attention(attention) is not None
    for owner, name, other in (
        (attention.qkv_proj, "quant_method", object()),
        (attention, "rotary_emb", nn.Identity()),
        (attention, "k_norm", nn.LayerNorm(32)),
        (attention, "qkv_proj", nn.Linear(4, 4)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other, raising=False)
            assert KeyValues.from_attention(attention) is None, name
