"""Seam: attention metadata for a subset of a step's rows.

vLLM builds metadata for the whole batch. A layer that some rows skip needs it for the others: their
query ranges, sequence lengths, block tables and slots. They are taken from the batch's buffers, go
through the `build_metadata` of vLLM's attention groups, and are set in a copy of vLLM's
`ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from sluice.models.engine.plan import Rows
from sluice.models.engine.row_builders import PLACES, RowBuilders

if TYPE_CHECKING:
    from sluice.models.engine.step import RoutedStep


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share block tables, and where the requests of a step have their K/V.

    Attributes:
        layer_names: as vLLM's forward context knows them.
        block_size: tokens of a block.
        blocks: block table of each request, int32, (requests, blocks), on the device.
        slots: of each scheduled token, int64, (tokens,), on the device.
    """

    layer_names: Sequence[str]
    block_size: int
    blocks: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchBuffers:
    """What attention metadata are made from: a step's batch as the model runner has it.

    Attributes:
        seq_lens: tokens of each request with those of the step, or more; (requests,), on the CPU.
        prompt_lens: tokens of each request that the runner counts as its prompt, (requests,), on
            the CPU.
        groups: one per group of vLLM's K/V cache.
        builders: build the metadata.
    """

    seq_lens: torch.Tensor
    prompt_lens: torch.Tensor
    groups: Sequence[CacheGroup]
    builders: RowBuilders


@dataclass(frozen=True, slots=True)
class RowsContext:
    """Attention metadata and K/V slots of one set of rows, by layer name.

    Attributes:
        metadata: as the layer's backend wants them.
        slots: int64, (rows,).
        positions: int64, (rows,).
        place: of the builders that own buffers of it; None for vLLM's own metadata.
    """

    metadata: dict[str, Any]
    slots: dict[str, torch.Tensor]
    positions: torch.Tensor
    place: int | None


@contextmanager
def rows_forward_context() -> Iterator[ForwardContext]:
    """The step's forward context with copied dictionaries, for the loop to change per layer.

    `all_moe_layers` is dropped: vLLM's mixture-of-experts op would otherwise take layer names in
    the order of calls, which a skipped layer breaks. `is_padding` covers the whole batch and
    would not fit a subset of its rows.
    """
    step = get_forward_context()
    copied = replace(
        step,
        attn_metadata=dict(step.attn_metadata),
        slot_mapping=dict(step.slot_mapping),
        all_moe_layers=None,
        is_padding=None,
    )
    with override_forward_context(copied):
        yield copied


class StepContext:
    """Points the forward context at row sets; their metadata is built on first use."""

    def __init__(
        self,
        buffers: BatchBuffers,
        context: ForwardContext,
        step: RoutedStep,
        positions: torch.Tensor,
    ) -> None:
        """Serve one step.

        Args:
            buffers: of its batch.
            context: from `rows_forward_context`.
            step: the step.
            positions: of all rows of the step, (tokens,), int64.
        """
        self._buffers = buffers
        self._context = context
        self._positions = positions
        self._step = step
        weak = step.weak
        # Rows of a weak pass have a request number past the batch and a table of their own.
        batch = np.arange(len(step.requests.ids))
        self._owners = batch if weak is None else np.concatenate([batch, weak.owners])
        self._blocks = [
            self._all_blocks(group, blocks.blocks) for group, blocks in enumerate(buffers.groups)
        ]
        self._slots = [self._group_slots(group) for group in range(len(buffers.groups))]
        self._whole: RowsContext | None = None
        if not step.plan.shape.pending:
            # Slots are padded for CUDA graphs; the loop runs the real tokens only.
            total = len(positions)
            slots = {name: slot[:total] for name, slot in context.slot_mapping.items()}
            self._whole = RowsContext(dict(context.attn_metadata), slots, positions, None)
        self._contexts: dict[int, RowsContext] = {}
        self._written: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        buffers.builders.begin_step()

    def enter(self, kv_name: str, rows: Rows, writes: Rows) -> torch.Tensor:
        """Point the forward context's entry of a layer at rows.

        Args:
            kv_name: the layer's.
            rows: that run.
            writes: those of them that write K/V.

        Returns:
            Positions of `rows`, (rows,), int64.
        """
        context = self._rows_context(rows)
        slots = context.slots if writes is rows else self._some_slots(rows, context, writes)
        self._context.attn_metadata[kv_name] = context.metadata[kv_name]
        self._context.slot_mapping[kv_name] = slots[kv_name]
        return context.positions

    def _some_slots(
        self, rows: Rows, context: RowsContext, writes: Rows
    ) -> dict[str, torch.Tensor]:
        """Slots of `rows` by layer name, -1 for those that are not in `writes`."""
        key = id(rows), id(writes)
        if key not in self._written:
            silent = torch.from_numpy(~np.isin(rows.tokens, writes.tokens))
            slots: dict[str, torch.Tensor] = {}
            for group in self._buffers.groups:
                all_slots = context.slots[group.layer_names[0]]
                some = all_slots.masked_fill(silent.to(all_slots.device), -1)
                slots.update(dict.fromkeys(group.layer_names, some))
            self._written[key] = slots
        return self._written[key]

    def _rows_context(self, rows: Rows) -> RowsContext:
        if rows.everything and self._whole is not None:
            return self._whole
        context = self._contexts.pop(id(rows), None)
        if context is None:
            place: int | None = len(self._contexts)
            if place == PLACES:
                place = self._contexts.pop(next(iter(self._contexts))).place
            assert place is not None
            context = self._build(rows, place)
        # Last is what was used last: the first one's place is taken next.
        self._contexts[id(rows)] = context
        return context

    def _group_slots(self, group: int) -> torch.Tensor:
        """K/V slots of all rows of the step in one cache group, (tokens,), int64."""
        shape = self._step.plan.shape
        if not shape.pending:
            return self._buffers.groups[group].slots
        blocks, size = self._blocks[group], self._buffers.groups[group].block_size
        requests = torch.from_numpy(shape.requests).to(blocks.device)
        block_of_row = blocks[requests, self._positions // size].long()
        slots: torch.Tensor = block_of_row * size + self._positions % size
        return slots

    def _all_blocks(self, group: int, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks of all passes of the step in one cache group, (passes, blocks), int32."""
        weak = self._step.weak
        if weak is None:
            return blocks
        weak_table = blocks.new_zeros((len(weak.blocks), blocks.shape[1]))
        for row, groups in zip(weak_table, weak.blocks, strict=True):
            row[: len(groups[group])] = torch.tensor(groups[group], dtype=row.dtype)
        return torch.cat([blocks, weak_table])

    def _build(self, rows: Rows, place: int) -> RowsContext:
        device = self._positions.device
        passes = torch.from_numpy(rows.requests)
        requests = torch.from_numpy(self._owners[rows.requests])
        lengths = torch.from_numpy(rows.lengths)
        starts_cpu = torch.zeros(len(rows.requests) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=starts_cpu[1:])
        seq_lens_cpu = self._buffers.seq_lens[requests] - torch.from_numpy(rows.trailing)
        seq_lens_cpu = seq_lens_cpu.to(torch.int32)
        on_device = passes.to(device)
        index = rows.index(device)
        positions = self._positions[index]
        prompt = self._buffers.prompt_lens[requests]
        common = CommonAttentionMetadata(
            query_start_loc=starts_cpu.to(device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=seq_lens_cpu.to(device),
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=len(rows.requests),
            num_actual_tokens=len(rows),
            max_query_len=int(rows.lengths.max()),
            max_seq_len=int(seq_lens_cpu.max()),
            block_table_tensor=torch.empty(0),
            slot_mapping=torch.empty(0),
            causal=True,
            is_prefilling=seq_lens_cpu - lengths < prompt,
            positions=positions,
        )
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group, attention_groups, blocks, all_slots in zip(
            self._buffers.groups,
            self._buffers.builders.take(place),
            self._blocks,
            self._slots,
            strict=True,
        ):
            common = common.replace(
                block_table_tensor=blocks[on_device], slot_mapping=all_slots[index]
            )
            for attention_group in attention_groups:
                built = attention_group.build_metadata(common)
                metadata.update(dict.fromkeys(attention_group.layer_names, built))
            slots.update(dict.fromkeys(group.layer_names, common.slot_mapping))
        return RowsContext(metadata, slots, positions, place)
