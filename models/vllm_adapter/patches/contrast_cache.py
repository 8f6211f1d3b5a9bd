"""Seam: K/V blocks for the weak pass of a contrast, beside those of its request.

Replaces `allocate_slots`, `free` and `pop_blocks_for_free` of vLLM's `KVCacheManager`, and
`Scheduler.schedule`. The scheduler knows one request. When the cache manager gives that request
slots, it gives as many to the weak pass under another name, or none to either; both are freed
together. So the passes are scheduled and preempted together. Weak blocks never enter the prefix
cache. Their block tables go to the workers as an attribute of the scheduler's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sluice.models.experts.contrast import BlockIds
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.vllm_adapter.patching import wrap_once

_OUTPUT_ATTRIBUTE = "sluice_weak_blocks"
_SUFFIX = "#weak"


def install() -> None:
    """Wrap vLLM's cache manager and scheduler; safe to call twice.

    Raises:
        SeamMovedError: a method is not where 0.32.0 has it.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap_once(KVCacheManager, "allocate_slots", _with_weak_slots)
    wrap_once(KVCacheManager, "free", _with_weak_free)
    wrap_once(KVCacheManager, "pop_blocks_for_free", _with_weak_pop)
    wrap_once(Scheduler, "schedule", _with_weak_tables)


def weak_blocks(scheduler_output: Any) -> dict[str, BlockIds]:
    """Blocks of the weak passes of a step, by request id."""
    tables: dict[str, BlockIds] = getattr(scheduler_output, _OUTPUT_ATTRIBUTE, {})
    return tables


def _contrasts(request: Any) -> bool:
    params = request.sampling_params
    text = ((params and params.extra_args) or {}).get(EXTRA_ARGS_KEY)
    # Called for every request and step: most policies need not be decoded to know.
    if text is None or '"contrast"' not in text:
        return False
    return RoutingExtraArgs.decode(text).policy.experts.contrast is not None


def _with_weak_slots(stock: Any) -> Callable[..., Any]:
    def allocate_slots(manager: Any, request: Any, num_new_tokens: int, **more: Any) -> Any:
        if not _contrasts(request):
            return stock(manager, request, num_new_tokens, **more)
        # Nothing of the prompt comes from the prefix cache (`prefix_cache`).
        assert not more.get("num_new_computed_tokens")
        name = request.request_id + _SUFFIX
        if more.get("full_sequence_must_fit"):
            both = 2 * _missing(manager, name, request, request.num_tokens)
            if both > manager.block_pool.get_num_free_blocks():
                return None
        total = request.num_computed_tokens + num_new_tokens
        reserved = more.pop("reserved_blocks", 0) + _missing(manager, name, request, total)
        blocks = stock(manager, request, num_new_tokens, reserved_blocks=reserved, **more)
        if blocks is not None:
            manager.coordinator.allocate_new_blocks(name, total, total, 0)
        return blocks

    return allocate_slots


def _missing(manager: Any, name: str, request: Any, tokens: int) -> int:
    """Blocks that a weak pass still needs to hold `tokens`."""
    computed = request.num_computed_tokens
    missing: int = manager.coordinator.get_num_blocks_to_allocate(
        request_id=name,
        num_tokens=min(tokens, manager.max_model_len),
        new_computed_blocks=manager.empty_kv_cache_blocks.blocks,
        num_encoder_tokens=0,
        total_computed_tokens=computed,
        num_local_computed_tokens=computed,
        num_tokens_main_model=tokens,
        prefill_end=request.num_prompt_tokens,
    )
    return missing


def _with_weak_free(stock: Any) -> Callable[..., Any]:
    def free(manager: Any, request: Any) -> None:
        stock(manager, request)
        if _contrasts(request):
            manager.coordinator.free(request.request_id + _SUFFIX)

    return free


def _with_weak_pop(stock: Any) -> Callable[..., Any]:
    def pop_blocks_for_free(manager: Any, request: Any) -> Any:
        blocks = stock(manager, request)
        if _contrasts(request):
            blocks = blocks + manager.coordinator.pop_blocks_for_free(request.request_id + _SUFFIX)
        return blocks

    return pop_blocks_for_free


def _with_weak_tables(stock: Any) -> Callable[..., Any]:
    def schedule(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(scheduler, *args, **kwargs)
        tables = {
            name: scheduler.kv_cache_manager.get_block_ids(name + _SUFFIX)
            for name in output.num_scheduled_tokens
            if name in scheduler.requests and _contrasts(scheduler.requests[name])
        }
        if tables:
            setattr(output, _OUTPUT_ATTRIBUTE, tables)
        return output

    return schedule
