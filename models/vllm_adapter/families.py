"""Which decoder architectures the layer loop can drive, and what their parts are called.

A family is a description, not a forward pass: the loop calls the model's own modules by these
names. All of them follow vLLM's pre-norm convention of passing `(delta, residual)` through fused
add+norm. `depth_refusal` reads vLLM's `VllmConfig`: what else of an engine the loop cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """The projections of an attention, by attribute name.

    Attributes:
        projections: all of them. Those that only some checkpoints have are None in the others.
        fill_projections: those that K/V come from.
        latent: the cache holds one latent per token that all heads share (multi-head latent
            attention, DeepSeek-V2, arXiv 2405.04434), not the keys and values of each head.
    """

    projections: tuple[str, ...]
    fill_projections: tuple[str, ...]
    latent: bool = False


MULTI_HEAD = AttentionKind(("qkv_proj", "o_proj"), ("qkv_proj",))


# Queries are compressed in some checkpoints, and then share the projection of the latent.
LATENT = AttentionKind(
    ("fused_qkv_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "q_proj", "kv_b_proj", "o_proj"),
    ("fused_qkv_a_proj", "kv_a_proj_with_mqa"),
    latent=True,
)


@dataclass(frozen=True, slots=True)
class DecoderFamily:
    """Attribute names of a decoder's parts; a dot leads into a part of a part.

    Attributes:
        name: what `/v1/routing/capabilities` calls it.
        architecture: class name in vLLM's registry and in the model's `config.json`.
        moe: the MLP is a mixture of experts.
        decoder: the module that holds embeddings, layers and final norm.
        embed: the decoder's method from token ids to embeddings.
        layers: the decoder's list of layers.
        final_norm: the decoder's last norm.
        attention_norm: a layer's norm before attention.
        attention: a layer's attention, called as `(positions=, hidden_states=)`.
        attention_kind: what the attention projects and caches.
        attention_op: the attention's vLLM `Attention` or `MLAAttention`, which owns the K/V cache.
        mlp_norm: a layer's norm before its MLP.
        mlp: a layer's MLP or mixture of experts, called as `(hidden_states)`.
        absent: optional parts of a layer that the loop does not run and that must be None.
        absent_config: keys of `config.json` for parts that the loop does not run; with one of
            them set the model is served stock.
        float16: vLLM runs the layers in float16 as in other types. Where it scales the residual
            stream in float16 against overflow, which the loop does not, such a model is served
            stock.
    """

    name: str
    architecture: str
    moe: bool = False
    decoder: str = "model"
    embed: str = "embed_input_ids"
    layers: str = "layers"
    final_norm: str = "norm"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    attention_kind: AttentionKind = MULTI_HEAD
    attention_op: str = "attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    absent: tuple[str, ...] = ()
    absent_config: tuple[str, ...] = ()
    float16: bool = True


_DEEPSEEK = DecoderFamily(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    moe=True,
    attention="self_attn.mla_attn",
    attention_kind=LATENT,
    attention_op="mla_attn",
    # Sparse attention of V3.2, and queries scaled by position.
    absent_config=("index_topk", "llama_4_scaling"),
    float16=False,
)


FAMILIES: tuple[DecoderFamily, ...] = (
    DecoderFamily("llama", "LlamaForCausalLM"),
    DecoderFamily("mistral", "MistralForCausalLM", absent=("ada_rms_norm_t_cond",)),
    DecoderFamily("qwen2", "Qwen2ForCausalLM"),
    DecoderFamily("qwen3", "Qwen3ForCausalLM"),
    DecoderFamily("olmoe", "OlmoeForCausalLM", moe=True),
    DecoderFamily("qwen2_moe", "Qwen2MoeForCausalLM", moe=True),
    DecoderFamily("qwen3_moe", "Qwen3MoeForCausalLM", moe=True),
    DecoderFamily("mixtral", "MixtralForCausalLM", moe=True, mlp="block_sparse_moe"),
    _DEEPSEEK,
    replace(_DEEPSEEK, name="deepseek_v3", architecture="DeepseekV3ForCausalLM"),
    DecoderFamily("gpt_oss", "GptOssForCausalLM", moe=True, attention="attn"),
)


def family_of(architecture: str) -> DecoderFamily | None:
    """The family that serves an architecture, or None: such a model is served stock."""
    return next((f for f in FAMILIES if f.architecture == architecture), None)


def depth_refusal(vllm_config: Any) -> str | None:
    """Why this engine cannot run depth controls, or None if it can.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    architecture = vllm_config.model_config.architecture
    family = family_of(architecture)
    if family is None:
        known = ", ".join(family.architecture for family in FAMILIES)
        return f"the model's architecture {architecture} is not supported (supported: {known})"
    refusal = _family_refusal(family, vllm_config.model_config)
    if refusal is not None:
        return refusal
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "expert load balancing": parallel.enable_eplb,
        "dual batch overlap": parallel.enable_dbo,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "LoRA": vllm_config.lora_config is not None,
        "K/V transfer": vllm_config.kv_transfer_config is not None,
        "fast prefill by K/V sharing": vllm_config.cache_config.kv_sharing_fast_prefill,
    }
    used = [name for name, is_used in refused.items() if is_used]
    return f"depth controls do not run together with {' and '.join(used)}" if used else None


def _family_refusal(family: DecoderFamily, model_config: Any) -> str | None:
    """Why the family's description does not fit this checkpoint or how vLLM runs it, or None."""
    parts = [
        key
        for key in family.absent_config
        if getattr(model_config.hf_text_config, key, None) is not None
    ]
    if parts:
        return f"{family.name} checkpoints with {' and '.join(parts)} are not supported"
    if family.attention_kind.latent and not model_config.use_mla:
        return f"{family.name} is supported with multi-head latent attention only"
    # By name: the HTTP server, which asks too, loads no torch.
    if not family.float16 and str(model_config.dtype) == "torch.float16":
        return f"{family.name} in float16 is not supported"
    return None
