"""Which engine configurations the layer loop cannot serve; used by the HTTP edge and the worker.

A refused configuration serves stock requests as ever; `routing.depth` is answered with 400 and
this reason.
"""

from __future__ import annotations

from typing import Any

from sluice.models.families import FAMILIES, family_of


def depth_refusal(vllm_config: Any) -> str | None:
    """Why this engine cannot run depth controls, or None if it can.

    Args:
        vllm_config: vLLM's `VllmConfig`.
    """
    architecture = vllm_config.model_config.architecture
    if family_of(architecture) is None:
        known = ", ".join(family.architecture for family in FAMILIES)
        return f"the model's architecture {architecture} is not supported (supported: {known})"
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
