"""Tiny random-weight models of every family, made from transformers configs."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

LAYERS = 6
VOCABULARY = 256
_SEED = 7

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DENSE = {**_COMMON, "intermediate_size": 128}
_HEAD_32 = {"head_dim": 32}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_DENSE,
    # vLLM's CPU kernel for latent attention knows these two sizes only.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
    # With plain rotary embedding vLLM 0.32.0 is wrong on the CPU: its kernel misreads the queries,
    # which are a part of each head.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {**_DENSE, **_HEAD_32}),
    "mistral": ("MistralConfig", {**_DENSE, **_HEAD_32, "sliding_window": None}),
    # Qwen2 and OLMoE have no head_dim of their own: two heads of 32.
    "qwen2": ("Qwen2Config", {**_DENSE, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", {**_DENSE, **_HEAD_32}),
    "olmoe": ("OlmoeConfig", {**_DENSE, **_EXPERTS, "num_attention_heads": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_DENSE,
            **_EXPERTS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_DENSE, **_HEAD_32, **_EXPERTS, "moe_intermediate_size": 64, "mlp_only_layers": [1]},
    ),
    "mixtral": (
        "MixtralConfig",
        {
            **_DENSE,
            **_HEAD_32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_DEEPSEEK,
            "q_lora_rank": 96,
            # The two that vLLM reads and transformers takes for granted.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_DENSE,
            **_HEAD_32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            # Every other layer; prompts and answers outgrow it.
            "sliding_window": 16,
        },
    ),
}


def make_model(family: str, folder: Path, **changes: object) -> Path:
    """Write a random model of `family` to `folder` in fp32 and return the folder.

    Weights are scaled up from transformers' initialisation so that greedy tokens vary and every
    sub-layer, left out alone, changes them (measured; at the plain scale half of them did not).
    """
    config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    torch.manual_seed(_SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(50.0 if "embed" in name else 6.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    model.save_pretrained(folder)
    return folder
