"""Seam: attention metadata for a subset of a step's rows.

vLLM builds metadata for the whole batch. A layer that some rows skip needs it for the others: their
query ranges, sequence lengths, block tables and slots. They are taken from the model runner's
buffers, go through its attention groups' `build_metadata`, and are set in a copy of vLLM's
`ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from sluice.models.engine.plan import Rows

if TYPE_CHECKING:
    from sluice.models.engine.step import RoutedStep


@dataclass(frozen=True, slots=True)
class RowsContext:
    """Attention metadata and K/V slots of one set of rows, by layer name."""

    metadata: dict[str, Any]
    slots: dict[str, torch.Tensor]


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
        self, runner: Any, context: ForwardContext, step: RoutedStep, positions: torch.Tensor
    ) -> None:
        """Serve one step.

        Args:
            runner: vLLM's model runner, with its inputs prepared.
            context: from `rows_forward_context`.
            step: the step.
            positions: of all rows of the step, (tokens,), int64.
        """
        self._runner = runner
        self._context = context
        self._positions = positions
        self._step = step
        weak = step.weak
        # Rows of a weak pass have a request number past the batch and a table of their own.
        batch = np.arange(len(step.requests.ids))
        self._owners = batch if weak is None else np.concatenate([batch, weak.owners])
        self._slots = [
            self._group_slots(group) for group in range(len(runner.kv_cache_config.kv_cache_groups))
        ]
        self._whole: RowsContext | None = None
        if not step.plan.shape.pending:
            # Slots are padded for CUDA graphs; the loop runs the real tokens only.
            total = len(positions)
            slots = {name: slot[:total] for name, slot in context.slot_mapping.items()}
            self._whole = RowsContext(dict(context.attn_metadata), slots)
        self._contexts: dict[int, tuple[RowsContext, torch.Tensor]] = {}
        self._prepared: dict[int, Any] = {}

    def enter(self, kv_name: str, rows: Rows) -> torch.Tensor:
        """Point the forward context's entry of a layer at `rows`; their positions, (rows,)."""
        context, positions = self._rows_context(rows)
        self._prepare(context.metadata[kv_name])
        self._context.attn_metadata[kv_name] = context.metadata[kv_name]
        self._context.slot_mapping[kv_name] = context.slots[kv_name]
        return positions

    def _prepare(self, metadata: Any) -> None:
        """Tell the prefill of a latent attention which rows come next.

        vLLM's backend for it takes them from the metadata that was built last, not from what the
        layer is given.
        """
        prefill = getattr(metadata, "prefill", None)
        backend = getattr(prefill, "prefill_backend", None)
        if backend is not None and self._prepared.get(id(backend)) is not prefill:
            backend.prepare_metadata(prefill)
            self._prepared[id(backend)] = prefill

    def _rows_context(self, rows: Rows) -> tuple[RowsContext, torch.Tensor]:
        if rows.everything and self._whole is not None:
            return self._whole, self._positions
        if id(rows) not in self._contexts:
            self._prepared.clear()
            self._contexts[id(rows)] = (
                self._build(rows),
                self._positions[rows.index(self._positions.device)],
            )
        return self._contexts[id(rows)]

    def _group_slots(self, group: int) -> torch.Tensor:
        """K/V slots of all rows of the step in one cache group, (tokens,), int64."""
        table = self._runner.input_batch.block_table[group]
        total = len(self._positions)
        shape = self._step.plan.shape
        if not shape.pending:
            slots: torch.Tensor = table.slot_mapping.gpu[:total]
            return slots
        blocks = self._block_table(group)
        requests = torch.from_numpy(shape.requests).to(blocks.device)
        block_of_row = blocks[requests, self._positions // table.block_size].long()
        all_slots: torch.Tensor = (
            block_of_row * table.block_size + self._positions % table.block_size
        )
        return all_slots

    def _block_table(self, group: int) -> torch.Tensor:
        """Blocks of all passes of the step in one cache group, (passes, blocks), int32."""
        table = self._runner.input_batch.block_table[group]
        blocks: torch.Tensor = table.get_device_tensor(self._runner.input_batch.num_reqs)
        weak = self._step.weak
        if weak is None:
            return blocks
        weak_table = blocks.new_zeros((len(weak.blocks), blocks.shape[1]))
        for row, groups in zip(weak_table, weak.blocks, strict=True):
            row[: len(groups[group])] = torch.tensor(groups[group], dtype=row.dtype)
        return torch.cat([blocks, weak_table])

    def _build(self, rows: Rows) -> RowsContext:
        runner = self._runner
        device = runner.device
        passes = torch.from_numpy(rows.requests)
        requests = torch.from_numpy(self._owners[rows.requests])
        lengths = torch.from_numpy(rows.lengths)
        starts_cpu = torch.zeros(len(rows.requests) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=starts_cpu[1:])
        seq_lens_cpu = runner.optimistic_seq_lens_cpu[requests] - torch.from_numpy(rows.trailing)
        seq_lens_cpu = seq_lens_cpu.to(torch.int32)
        on_device = passes.to(device)
        index = rows.index(device)
        prompt = runner.input_batch.num_prompt_tokens_cpu_tensor[requests]
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
            positions=self._positions[index],
        )
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group_id, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            common = common.replace(
                block_table_tensor=self._block_table(group_id)[on_device],
                slot_mapping=self._slots[group_id][index],
            )
            for attention_group in runner.attn_groups[group_id]:
                built = attention_group.build_metadata(common)
                metadata.update(dict.fromkeys(attention_group.layer_names, built))
            slots.update(dict.fromkeys(group.layer_names, common.slot_mapping))
        return RowsContext(metadata, slots)
