"""The architecture of the demo model: a stock Qwen3-MoE decoder small enough for git."""

from typing import TYPE_CHECKING

from sluice.models.offline.demo.training.tokenizer import END, MAX_TOKENS, PAD, vocabulary

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


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
    import torch
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)
