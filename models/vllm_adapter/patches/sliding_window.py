"""Seam: blocks behind a sliding window stay while tokens may still wait for their upper layers.

Replaces `SlidingWindowManager.get_num_skipped_tokens`. vLLM frees a block of a sliding-window layer
once the newest token no longer attends to it. A token that waits
(`sluice.models.depth.recompute`) is older by up to `LIMIT` positions, and so is its window: without
this it would read blocks that have become another request's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sluice.models.depth.recompute import LIMIT
from sluice.models.vllm_adapter.patching import wrap_once


def install() -> None:
    """Let vLLM free such blocks `LIMIT` tokens later; nothing else changes."""
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    wrap_once(SlidingWindowManager, "get_num_skipped_tokens", _later)


def _later(stock: Callable[[Any, int], int]) -> Callable[[Any, int], int]:
    def skipped(manager: Any, num_computed_tokens: int) -> int:
        return stock(manager, max(num_computed_tokens - LIMIT, 0))

    return skipped
