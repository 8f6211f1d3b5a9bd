"""The demo model: a stock Qwen3-MoE decoder small enough for git; built, written and loaded."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sluice.models.offline.demo.training.experts import (
    IMPLEMENTATION,
    register_experts_implementation,
)
from sluice.models.offline.demo.training.tokenizer import (
    END,
    MAX_TOKENS,
    PAD,
    build_tokenizer,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

Model = Any
"""A transformers decoder of the Qwen3-MoE architecture, fp32, in evaluation mode."""


def demo_config(layers: int = 8, hidden: int = 128, experts: int = 16) -> "Qwen3MoeConfig":
    """Describe the demo model; the defaults are what the shipped weights have (3.6 M parameters).

    The widths are multiples of 32, which the CPU expert and attention kernels of vLLM ask for.
    """
    from transformers import Qwen3MoeConfig

    ids = vocabulary()
    return Qwen3MoeConfig(
        vocab_size=len(ids),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=ids[PAD],
        bos_token_id=None,
        eos_token_id=ids[END],
    )


def build_model(config: "Qwen3MoeConfig", seed: int) -> "Qwen3MoeForCausalLM":
    """Initialise a model in float32 from a seed."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)


def load_model(folder: Path) -> Model:
    """Load a weights folder in fp32, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    register_experts_implementation()
    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation(IMPLEMENTATION)
    return model.requires_grad_(False).train(False)


def export(model: "Qwen3MoeForCausalLM", folder: Path) -> None:
    """Write bfloat16 weights, configuration, tokenizer and generation settings, each atomically.

    Files that a reader has open stay intact; files of other names in ``folder`` are left alone.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(
        {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    )
    copy.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.save_pretrained(scratch)
        build_tokenizer().save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)
