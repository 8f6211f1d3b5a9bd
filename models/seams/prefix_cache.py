"""Seam: a request whose mask is pooled over its whole prompt reads none of it from the cache.

vLLM asks each request whether it may read the prefix cache. A prompt token that is not computed
has no hidden state to pool, and the mask must not depend on what happens to be cached.
"""

from __future__ import annotations

import functools
from typing import Any

from sluice.models.policy import PolicyTicket
from sluice.models.stack import SeamMovedError

_PATCHED = "_sluice_whole_prompt"
_NAME = "get_skip_reading_prefix_cache"


def install() -> None:
    """Wrap vLLM's question; safe to call twice.

    Raises:
        SeamMovedError: the method is not where 0.32.0 has it.
    """
    from vllm.v1.request import Request

    stock = getattr(Request, _NAME, None)
    if stock is None:
        raise SeamMovedError(f"`{_NAME}` on vllm.v1.request.Request")
    if not hasattr(stock, _PATCHED):
        setattr(Request, _NAME, _with_whole_prompt(stock))


def _with_whole_prompt(stock: Any) -> Any:
    @functools.wraps(stock)
    def skips_reading(request: Any) -> bool:
        params = request.sampling_params
        ticket = params and PolicyTicket.from_extra_args(params.extra_args)
        return bool(ticket and ticket.policy.reads_whole_prompt) or bool(stock(request))

    setattr(skips_reading, _PATCHED, True)
    return skips_reading
