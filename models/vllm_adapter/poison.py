"""Seam: a debug mode that overwrites K/V blocks when a request gets them (`SLUICE_POISON_KV=1`).

Keys become NaN, so a slot that a request attends to without having written it turns its logits to
NaN. Values become a huge finite number: vLLM's CPU kernel multiplies the values behind the end of
a sequence by zero, and zero times NaN would spoil what is right. Latents, which are both, become
NaN. Off by default, and for the CPU only.

Reads the blocks of vLLM's `SchedulerOutput` and writes into its K/V caches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from sluice.models.experts.contrast import BlockIds

POISON_ENV = "SLUICE_POISON_KV"
_VALUE = 1e4


def poison_enabled(device: torch.device) -> bool:
    """Whether the environment turns the mode on.

    Raises:
        RuntimeError: it does, and the device is not a CPU: its cache has another layout.
    """
    if os.environ.get(POISON_ENV, "0") in ("", "0"):
        return False
    if device.type != "cpu":
        raise RuntimeError(f"{POISON_ENV} works on the CPU only, not on {device.type}")
    return True


def poison_new_blocks(
    kv_caches: Iterable[torch.Tensor],
    scheduler_output: Any,
    weak: Iterable[tuple[BlockIds, BlockIds]],
    *,
    block_size: int,
    latent: bool,
) -> None:
    """Overwrite the blocks that this step's requests got and have not computed.

    Args:
        kv_caches: vLLM's, one per layer, (blocks, ...).
        scheduler_output: of the step.
        weak: blocks of each weak pass in the step, and those it had when it last ran.
        block_size: tokens of a block.
        latent: the caches hold latents.
    """
    fresh: set[int] = set()
    for request in scheduler_output.scheduled_new_reqs:
        # The first blocks came from the prefix cache, written.
        fresh |= _after(request.block_ids, request.num_computed_tokens // block_size)
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        resumed = request_id in cached.resumed_req_ids
        fresh |= _after(blocks or (), computed // block_size if resumed else 0)
    for blocks, before in weak:
        fresh |= _after(blocks, 0) - _after(before, 0)
    if not fresh:
        return
    index = torch.tensor(sorted(fresh))
    for cache in kv_caches:
        if latent:
            cache[index] = float("nan")
            continue
        # As vLLM's CPU backend splits its cache of shape (blocks, heads, ., .).
        keys, values = cache.chunk(2, dim=2)
        keys[index] = float("nan")
        values[index] = _VALUE


def _after(groups: tuple[list[int], ...], written: int) -> set[int]:
    return {block for blocks in groups for block in blocks[written:]}
