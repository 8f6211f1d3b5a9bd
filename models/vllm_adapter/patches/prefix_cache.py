"""Seam: which blocks of the prefix cache a request shares with others.

Replaces `generate_block_hash_extra_keys`, in both of vLLM's modules that hold it. vLLM hashes a
block from its tokens, LoRA, media and `cache_salt`. The salt covers what a policy does to prompt
tokens. Where a policy treats generated tokens differently, a block that holds some must never be
part of another request's prompt, so its hash gets one more key, the request's id. The same goes for
the block with the last prompt token, where a policy treats that one differently. Only the request
itself, resumed after a preemption, finds such a block again. Hashes are chained: one key separates
all blocks after it.

Replaces `Request.get_skip_reading_prefix_cache` too. A request whose every prompt token must run
may not read the cache: a token that is not computed has no hidden state to pool, and a mask must
not depend on what happens to be cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sluice.models.depth.prefix_sharing import (
    SALT_PREFIX,
    private_generated,
    private_last_prompt,
    reads_whole_prompt,
)
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.vllm_adapter.patching import wrap_once


def private_block_key(request: Any, end: int) -> tuple[str, str] | None:
    """Hash key that keeps the block ending at token `end` (exclusive) to its request, or None.

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
    is_private = private_last_prompt if only_prompt else private_generated
    if not is_private(extra.policy):
        return None
    # The tag is vLLM's own for salts, so that its consumers of hash keys understand it.
    return ("cache_salt", f"{SALT_PREFIX}generated-{request.request_id}")


def install() -> None:
    """Replace these functions; safe to call twice.

    Raises:
        SeamMovedError: something is not where 0.32.0 has it.
    """
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.request import Request

    for module in (kv_cache_utils, block_pool):
        wrap_once(module, "generate_block_hash_extra_keys", _with_private_key)
    wrap_once(Request, "get_skip_reading_prefix_cache", _with_whole_prompts)


def _with_private_key(stock: Any) -> Callable[..., Any]:
    def keys(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        stock_keys, next_mm_idx = stock(request, start, end, start_mm_idx)
        private = private_block_key(request, end)
        if private is None:
            return stock_keys, next_mm_idx
        return (*(stock_keys or ()), private), next_mm_idx

    return keys


def _with_whole_prompts(stock: Any) -> Callable[[Any], bool]:
    def skips_reading(request: Any) -> bool:
        params = request.sampling_params
        extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
        return bool(extra and reads_whole_prompt(extra.policy)) or bool(stock(request))

    return skips_reading
