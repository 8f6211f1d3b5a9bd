"""Seam: prefix-cache hashes of blocks that hold generated tokens.

vLLM hashes a block from its tokens, LoRA, media and `cache_salt`. The salt covers what a policy
does to prompt tokens. Where a policy treats generated tokens differently, a block that holds some
must never serve as part of somebody's prompt, so its hash gets one more key: the request's id. The
same goes for the block with the last prompt token, where a policy treats that one differently. Only
the request itself, resumed after a preemption, finds such a block again. Hashes are chained, so one
key separates everything after it.

vLLM also asks each request whether it may read the prefix cache at all. One whose every prompt
token must run may not: a prompt token that is not computed has no hidden state to pool, and a mask
must not depend on what happens to be cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.vllm_adapter.patching import wrap_once


def own_block_key(request: Any, end: int) -> tuple[str, str] | None:
    """Extra hash key of the block that ends at token `end` (exclusive), or None.

    Args:
        request: vLLM scheduler `Request`.
    """
    params = request.sampling_params
    if params is None or end < request.num_prompt_tokens:
        return None
    extra = RoutingExtraArgs.from_extra_args(params.extra_args)
    if extra is None:
        return None
    only_prompt = end == request.num_prompt_tokens
    policy = extra.policy
    if not (policy.private_last_prompt if only_prompt else policy.private_generated):
        return None
    # The tag is vLLM's own for salts, so that its consumers of hash keys understand it.
    return ("cache_salt", f"sluice-generated-{request.request_id}")


def install() -> None:
    """Wrap what vLLM asks of a request's blocks, in the modules that hold it; safe to call twice.

    Raises:
        SeamMovedError: something is not where 0.32.0 has it.
    """
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.request import Request

    for module in (kv_cache_utils, block_pool):
        wrap_once(module, "generate_block_hash_extra_keys", _with_own_key)
    wrap_once(Request, "get_skip_reading_prefix_cache", _with_whole_prompt)


def _with_own_key(stock: Any) -> Callable[..., Any]:
    def keys(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        found, next_mm_idx = stock(request, start, end, start_mm_idx)
        own = own_block_key(request, end)
        if own is not None:
            found = (*(found or ()), own)
        return found, next_mm_idx

    return keys


def _with_whole_prompt(stock: Any) -> Callable[[Any], bool]:
    def skips_reading(request: Any) -> bool:
        params = request.sampling_params
        extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
        return bool(extra and extra.policy.reads_whole_prompt) or bool(stock(request))

    return skips_reading
