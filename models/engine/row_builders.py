"""Seam: metadata builders of our own, so that row sets of one step do not share a buffer.

A builder of vLLM may keep one buffer and overwrite it at each build: FlashAttention 3 does so with
its schedule (`scheduler_metadata` in `v1/attention/backends/flash_attn.py`), others with the pages
of a batch. vLLM builds once per step, and gives microbatches builders of their own. A step of ours
builds once for each set of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

PLACES = 8
"""Row sets of a step that have metadata at the same time; a builder may own much memory."""


class RowBuilders:
    """vLLM's attention groups once more for each of `PLACES` row sets, made on first use.

    There are two lots, which steps take in turn: a step may be prepared while the device still
    copies from the buffers of the step before, but not of the one before that.
    """

    def __init__(
        self,
        stock: Sequence[Sequence[Any]],
        kernel_block_sizes: Sequence[int],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        """Nothing is made yet.

        Args:
            stock: the runner's `AttentionGroup`s, by group of the K/V cache.
            kernel_block_sizes: tokens of a block as kernels see it, by group of the K/V cache.
            vllm_config: vLLM's `VllmConfig`.
            device: of the model.
        """
        self._stock = stock
        self._sizes = kernel_block_sizes
        self._config = vllm_config
        self._device = device
        self._lots: tuple[dict[int, list[list[Any]]], ...] = ({}, {})
        self._step = 0
        self._taken: set[int] = set()

    def begin_step(self) -> None:
        """Begin a step: all places are free."""
        self._step += 1
        self._taken.clear()

    def take(self, place: int) -> list[list[Any]]:
        """Attention groups of a place, by group of the K/V cache.

        What was built there in this step must not be used any more.
        """
        if place in self._taken and self._device.type == "cuda":
            # The copies of its last build may still read from its buffers.
            torch.cuda.current_stream(self._device).synchronize()
        self._taken.add(place)
        lot = self._lots[self._step % len(self._lots)]
        if place not in lot:
            lot[place] = [
                [self._copy(group, index) for group in groups]
                for index, groups in enumerate(self._stock)
            ]
        return lot[place]

    def _copy(self, stock: Any, index: int) -> Any:
        """An attention group with a builder of its own; workspaces stay the stock builder's."""
        from vllm.config import set_current_vllm_config

        group = replace(stock, metadata_builders=[], kernel_block_table=None)
        size = self._sizes[index] if index < len(self._sizes) else None
        with set_current_vllm_config(self._config):
            group.create_metadata_builders(self._config, self._device, size)
        shared, own = stock.get_metadata_builder(), group.get_metadata_builder()
        # They are written and read by one kernel after the other, as vLLM's microbatches do.
        if hasattr(own, "set_workspace_buffer"):
            own.set_workspace_buffer(shared._get_workspace_buffer())
        if hasattr(own, "chunked_prefill_workspace"):
            own.chunked_prefill_workspace = shared.chunked_prefill_workspace
        return group
