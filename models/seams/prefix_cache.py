"""Seam: a request whose every prompt token must run reads none of them from the prefix cache.

vLLM asks each request whether it may read the prefix cache. A prompt token that is not computed
has no hidden state to pool, and a mask must not depend on what happens to be cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sluice.models.policy import PolicyTicket
from sluice.models.seams.wrap import wrap_once


def install() -> None:
    """Wrap vLLM's question; safe to call twice.

    Raises:
        SeamMovedError: the method is not where 0.32.0 has it.
    """
    from vllm.v1.request import Request

    wrap_once(Request, "get_skip_reading_prefix_cache", _with_whole_prompt)


def _with_whole_prompt(stock: Any) -> Callable[[Any], bool]:
    def skips_reading(request: Any) -> bool:
        params = request.sampling_params
        ticket = params and PolicyTicket.from_extra_args(params.extra_args)
        return bool(ticket and ticket.policy.reads_whole_prompt) or bool(stock(request))

    return skips_reading
