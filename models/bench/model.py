"""The model that speed is measured on: a dense decoder of about 150 M random parameters."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 4096
LAYERS = 20
_SEED = 0


def make_bench_model(folder: Path) -> int:
    """Write the model, fp32, and return its number of parameters.

    The vocabulary is small so that blocks, which can be skipped, and not the LM head, which can
    not, make up a step, as in the large models it stands for.
    """
    import torch
    import transformers

    torch.manual_seed(_SEED)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(bos_token_id=None, eos_token_id=None)
    model.save_pretrained(folder)
    return int(model.num_parameters())
