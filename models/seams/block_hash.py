"""Seam: prefix-cache hashes of blocks that hold generated tokens.

vLLM hashes a block from its tokens, LoRA, media and `cache_salt`. The salt covers what a policy
does to prompt tokens. Where a policy treats generated tokens differently, a block that holds some
must never serve as part of somebody's prompt, so its hash gets one more key: the request's id.
Only the request itself, resumed after a preemption, finds such a block again. Hashes are chained,
so one key separates everything after it.
"""

from __future__ import annotations

import functools
from typing import Any

from sluice.models.policy import PolicyTicket
from sluice.models.stack import SeamMovedError

_PATCHED = "_sluice_generated_key"


def generated_block_key(request: Any, end: int) -> tuple[str, str] | None:
    """Extra hash key of the block that ends at token `end` (exclusive), or None.

    Args:
        request: vLLM scheduler `Request`.
    """
    params = request.sampling_params
    if params is None or end <= request.num_prompt_tokens:
        return None
    ticket = PolicyTicket.from_extra_args(params.extra_args)
    if ticket is None or not ticket.policy.private_generated:
        return None
    # The tag is vLLM's own for salts, so that its consumers of hash keys understand it.
    return ("cache_salt", f"sluice-generated-{request.request_id}")


def install() -> None:
    """Wrap vLLM's key function in the modules that hold it; safe to call twice.

    Raises:
        SeamMovedError: the function is not where 0.32.0 has it.
    """
    from vllm.v1.core import block_pool, kv_cache_utils

    name = "generate_block_hash_extra_keys"
    for module in (kv_cache_utils, block_pool):
        stock = getattr(module, name, None)
        if stock is None:
            raise SeamMovedError(f"`{name}` in {module.__name__}")
        if not hasattr(stock, _PATCHED):
            setattr(module, name, _with_generated_key(stock))


def _with_generated_key(stock: Any) -> Any:
    @functools.wraps(stock)
    def keys(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        found, next_mm_idx = stock(request, start, end, start_mm_idx)
        own = generated_block_key(request, end)
        if own is not None:
            found = (*(found or ()), own)
        return found, next_mm_idx

    setattr(keys, _PATCHED, True)
    return keys
