"""Which engine configurations the layer loop cannot serve; used by the HTTP edge and the worker.

A refused configuration serves stock requests as ever; `routing.depth` is answered with 400 and
this reason.
"""

from __future__ import annotations

from typing import Any

from sluice.models.families import FAMILIES, DecoderFamily, family_of


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
    own = _family_refusal(family, vllm_config.model_config)
    if own is not None:
        return own
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "expert load balancing": parallel.enable_eplb,
        "dual batch overlap": parallel.enable_dbo,
        "LoRA": vllm_config.lora_config is not None,
        "K/V transfer": vllm_config.kv_transfer_config is not None,
        "fast prefill by K/V sharing": vllm_config.cache_config.kv_sharing_fast_prefill,
    }
    hit = [name for name, used in refused.items() if used]
    return f"depth controls do not run together with {' and '.join(hit)}" if hit else None


def _family_refusal(family: DecoderFamily, model_config: Any) -> str | None:
    """What of this checkpoint, or of how vLLM runs it, the family's description does not cover."""
    parts = [
        key
        for key in family.absent_config
        if getattr(model_config.hf_text_config, key, None) is not None
    ]
    if parts:
        return f"{family.name} checkpoints with {' and '.join(parts)} are not supported"
    if family.attention_kind.latent and not model_config.use_mla:
        return f"{family.name} is supported with multi-head latent attention only"
    # By name: the HTTP edge, which asks too, loads no torch.
    if not family.float16 and str(model_config.dtype) == "torch.float16":
        return f"{family.name} in float16 is not supported"
    return None
