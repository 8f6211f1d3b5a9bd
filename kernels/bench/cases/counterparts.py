"""What stock vLLM and PyTorch run where an operation of ours would.

vLLM's own is left out where it is not installed or has no such kernel; `missing` says so.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from sluice.kernels.bench.agreement import routes, within
from sluice.kernels.bench.cases.case import Call, Counterpart


def missing(device: torch.device) -> str | None:
    """Why there are no figures of vLLM's, or None if there are."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if device.type == "cuda" and _cuda_operations() is None:
        return "vLLM has no CUDA kernels here"
    return None


def stock_routes(
    logits: torch.Tensor, top_k: int, selection: torch.Tensor
) -> tuple[Counterpart, ...]:
    """A router with softmax, top-k and renormalised weights.

    Args:
        logits: fp32, (rows, experts).
        top_k: experts per token.
        selection: fp32, (rows, experts): what rows select by.
    """

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids.int()

    counterparts = [Counterpart("PyTorch", plain, routes(selection))]
    call = _vllm_cpu(logits, top_k) if logits.device.type == "cpu" else _vllm_cuda(logits, top_k)
    if call is not None:
        counterparts.append(Counterpart("vLLM", call, routes(selection)))
    return tuple(counterparts)


def stock_fill(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[Counterpart, ...]:
    """vLLM's norm, rotary embedding and cache write, one kernel each; on a GPU only.

    Args:
        key: as in `kv_fill`.
        value: as in `kv_fill`.
        positions: as in `kv_fill`.
        cos_sin: as in `kv_fill`.
        slots: as in `kv_fill`.
        cache: of keys, then of values, (2, blocks, block_size, heads, head_size); written to.
        weight: of the norm.
        eps: of the norm.
    """
    operations = _cuda_operations() if key.device.type == "cuda" else None
    if operations is None:
        return ()
    normed = torch.empty_like(key)
    scale = torch.ones((), device=key.device)

    def run() -> tuple[torch.Tensor, ...]:
        operations.rms_norm(normed, key, weight, eps)
        turned = normed.view(len(key), -1)
        operations.rotary_embedding(positions, turned, None, key.shape[-1], cos_sin, True)
        operations.reshape_and_cache_flash(normed, value, *cache, slots, "auto", scale, scale)
        return cache.unbind()

    # It rounds after each of its kernels.
    rounded = within(*[max(1e-5, 8 * torch.finfo(key.dtype).eps)] * 2)
    return (Counterpart("vLLM", run, rounded),)


def _vllm_cpu(logits: torch.Tensor, top_k: int) -> Call | None:
    if find_spec("vllm") is None:
        return None
    module = import_module("vllm.model_executor.layers.fused_moe.router.cpu_router")
    router = module.CPURouter(top_k, logits.shape[1])
    return lambda: router._compute_routing(logits, logits, None)


def _vllm_cuda(logits: torch.Tensor, top_k: int) -> Call | None:
    operations = _cuda_operations()
    if operations is None:
        return None
    size = (len(logits), top_k)
    weights = torch.empty(size, device=logits.device)
    ids, order = (torch.empty(size, dtype=torch.int32, device=logits.device) for _ in range(2))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        operations.topk_softmax(weights, ids, order, logits, True)
        return weights, ids

    return run


def _cuda_operations() -> Any:
    """vLLM's kernels, or None where there are none or their library does not load."""
    if find_spec("vllm") is None:
        return None
    operations = import_module("vllm._custom_ops")
    return operations if hasattr(torch.ops._moe_C, "topk_softmax") else None
